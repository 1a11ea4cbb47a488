"""OpenVINO: the precision that it really runs in, and its memory."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import HERE

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.engines import load_engine
from snoopi_rt.engines.openvino import arithmetic
from snoopi_rt.pipeline import EMBEDDED


@pytest.mark.skipif("openvino" not in HERE, reason="needs openvino")
def test_openvino_reports_the_precision_that_it_runs_in(original: Bundle) -> None:
    assert load_engine("openvino", original.folder / "generator.onnx", "fp32").provider == "CPU f32"
    provider = load_engine("openvino", original.folder / "generator.onnx", "bf16").provider
    assert provider in ("CPU bf16", "CPU f32 (this processor has no bf16)")


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_openvino_computes_in_bf16_where_the_processor_can_and_says_where_it_cannot(precision: str) -> None:
    assert arithmetic(precision, ["FP32", "BF16"]) == ("bf16", "")
    assert arithmetic(precision, ["FP32", "FP16"]) == ("f32", " (this processor has no bf16)")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8-weights", "int4-weights", None])
def test_openvino_computes_all_other_precisions_in_f32(precision: str | None) -> None:
    assert arithmetic(precision, ["FP32", "BF16", "FP16"]) == ("f32", "")


@pytest.mark.skipif("openvino" not in HERE or sys.platform != "linux", reason="needs openvino and /proc")
def test_openvino_needs_no_more_memory_after_many_token_lengths() -> None:
    def memory() -> int:
        return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]

    variant = Bundle.load(EMBEDDED).variant("generator", "openvino")
    engine = load_engine("openvino", EMBEDDED / variant.files[0].path, variant.precision, 2)
    shapes = {spec.name: spec.shape for spec in engine.inputs}
    stream, after = np.random.RandomState(0), {}
    for call in range(100):
        tokens = dict(zip(("prompt", "negative"), stream.randint(1, 120, 2).tolist(), strict=True))
        inputs: dict[str, np.ndarray] = {
            "noise": np.zeros([side or 1 for side in shapes["noise"]], np.float32),
            "negative_scale": np.zeros(1, np.float32),
        }
        for side, length in tokens.items():
            inputs[f"{side}_states"] = np.zeros((1, length, shapes[f"{side}_states"][2] or 0), np.float32)
            inputs[f"{side}_mask"] = np.ones((1, length), bool)
        engine(**{name: inputs[name] for name in shapes})
        after[call] = memory()
    assert after[99] - after[40] < 6e6
