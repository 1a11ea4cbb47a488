"""The final check of an export: images drawn through the finished bundle, from prompts at the limits of what it takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.bundle.tokenizer import Tokenizer
from snoopi_rt.cache import Cache
from snoopi_rt.errors import OutputError
from snoopi_rt.export.onnx_graphs.parity import relative_l2
from snoopi_rt.loading import open_pipeline
from snoopi_rt.prompt_encoder import Conditioning

MAX_DISTANCE = 0.5
"""Relative L2 from PyTorch's states: 4-bit weights give 0.2 at most, a wrong row or position 1 and more."""


@dataclass(frozen=True)
class Extreme:
    """A prompt at a limit."""

    name: str
    """What it is, for people."""
    ids: Tensor
    """(1, T) int64."""
    states: Mapping[str, Tensor]
    """PyTorch's outputs of the text encoder, by name."""


def extreme_ids(tokenizer: Tokenizer, highest: int) -> dict[str, Tensor]:
    """The ids (1, T) of the longest possible prompt and of one with the highest token id, by name."""
    longest, short = (torch.from_numpy(tokenizer(text, truncate=True)) for text in ("a " * tokenizer.max_tokens, "a cat"))
    short[0, min(1, short.shape[1] - 1)] = highest
    return {"the longest prompt": longest, "the highest token id": short}


def draw_whole(bundle: Bundle, engines: Sequence[str], extremes: Sequence[Extreme], say: Callable[[str], None]) -> None:
    """Draws each size of the bundle on each of its engines, from the extremes, or from stored prompts if it has no text encoder,
    and the first size with the two prompts swapped as well.

    Raises OutputError for states unlike PyTorch's, NaN and a flat image, BundleError if a graph gives another shape than is promised.
    """
    for engine in (engine for engine in engines if engine in bundle.engines()):
        with open_pipeline(bundle, engine, None, None, Cache(), low_memory=True) as pipe:
            prompts = [_conditioning(bundle, engine, extreme, pipe._prompts.encode_ids(extreme.ids.numpy())) for extreme in extremes]
            if not prompts:
                assert bundle.prompts is not None
                prompts = [pipe.prepare(text) for text in (bundle.prompts.texts[0], bundle.prompts.texts[-1])]
            one, other = prompts
            for size, prompt, negative in ((bundle.sizes[0], other, one), *((size, one, other) for size in bundle.sizes)):
                pipe.generate(prompt, None if bundle.guidance.kind == "none" else negative, seed=0, size=size)
        say(f"drawn whole on {engine}: {', '.join(prompts)}")


def _conditioning(bundle: Bundle, engine: str, extreme: Extreme, states: Mapping[str, np.ndarray]) -> Conditioning:
    for name, expected in extreme.states.items():
        output = states[name]
        if output.shape != tuple(expected.shape):
            raise OutputError(f"text_encoder gives {name} of shape {output.shape} on engine {engine!r}, PyTorch {tuple(expected.shape)}")
        if not (error := relative_l2(output, expected.numpy())) <= MAX_DISTANCE:  # NaN neither
            raise OutputError(
                f"text_encoder gives other {name} than PyTorch on engine {engine!r} for {extreme.name} (relative L2 {error:.2g}): "
                "the bundle would draw something else"
            )
    return Conditioning(extreme.name, dict(states), bundle.hash)
