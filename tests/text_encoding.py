"""Prompts of every kind, and text encoders and tokenizers as tests look at them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import tiny_students
from torch import Tensor, nn

from snoopi_rt.bundle.bundle import Text
from snoopi_rt.bundle.tokenizer import Tokenizer
from snoopi_rt.engines import load_engine
from snoopi_rt.export.onnx_graphs.write import write_graph

PROMPTS = [
    "",
    "a cat",
    "A  photo of\ta CAT, it's 3 o'clock!! ",
    "naïve café 猫 🐈 ΣΑΣ \N{LATIN SMALL LETTER A}\N{COMBINING ACUTE ACCENT}",
    f"a {tiny_students.EOS} b",
    "cat on a mat, " * 60,
]


def relative(output: Tensor | np.ndarray, expected: Tensor) -> float:
    """The relative L2 distance."""
    assert output.shape == expected.shape
    return float(np.linalg.norm(np.asarray(output) - expected.numpy()) / np.linalg.norm(expected.numpy()))


def on_cpu(
    module: nn.Module, example: Tensor, axes: Mapping[int, str], outputs: list[str], path: Path, opset: int
) -> Callable[[Tensor], dict[str, np.ndarray]]:
    """The module as a graph in ONNX Runtime."""
    write_graph(module, {"ids": example}, outputs, {"ids": axes}, path, opset=opset)
    engine = load_engine("cpu", path)
    return lambda ids: engine(ids=ids.numpy())


def tokens(rule: Text, folder: Path) -> Tokenizer:
    """The tokenizer that a rule was written for."""
    assert rule.tokenizer is not None
    return Tokenizer(folder / rule.tokenizer.path, rule.max_tokens, rule.lowercase, rule.pad)
