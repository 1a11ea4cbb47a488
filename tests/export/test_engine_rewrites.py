"""Rewrites of a graph that one engine runs faster: the same numbers from the same file of weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_nodes import node_counts
from torch import Tensor, nn

from snoopi_rt.engines import installed, load_engine, ort
from snoopi_rt.export.attention import merge_heads, split_heads
from snoopi_rt.export.onnx_graphs.engine_rewrites import one_image_bf16, onnxruntime_operators
from snoopi_rt.export.onnx_graphs.quantise import calibrate, quantise
from snoopi_rt.export.onnx_graphs.weight_compression import WeightFormat
from snoopi_rt.export.onnx_graphs.write import write_graph
from snoopi_rt.kernels import fused_attention

ENGINES = [name for name in installed() if name in ("cpu", "openvino")]
needs_onnxruntime = pytest.mark.skipif("cpu" not in ENGINES, reason="needs onnxruntime")


class SelfAttention(nn.Module):
    """Tokens of two heads that attend to each other, with their four projections."""

    def __init__(self, head: int = 24):
        super().__init__()
        torch.manual_seed(0)
        self.projections = nn.ModuleList(nn.Linear(2 * head, 2 * head) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (split_heads(layer(x), 2) for layer in self.projections[:3])
        return x + self.projections[3](merge_heads(fused_attention(q, k, v, mask)))


def written(module: nn.Module, path: Path, weights: WeightFormat = "fp16", **inputs: Tensor) -> Path:
    write_graph(module, inputs, ("y",), {name: {0: "batch"} for name in inputs}, path, weights)
    return path


def answer(engine: str, path: Path, precision: str = "fp32", **inputs: Tensor) -> np.ndarray:
    return load_engine(engine, path, precision)(**{name: value.numpy() for name, value in inputs.items()})["y"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_graph_for_one_image_shares_the_weights_of_the_graph_for_any_number(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 10, 48)
    path, one = written(SelfAttention(), tmp_path / "any.onnx", x=x), tmp_path / "one.onnx"
    assert one_image_bf16(path, one)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["any.onnx", "any.onnx.data", "one.onnx"]
    assert load_engine(engine, one, "fp32").inputs[0].shape == (1, 10, 48)
    np.testing.assert_allclose(answer(engine, one, x=x[:1]), answer(engine, path, x=x[:1]), atol=1e-5)


@pytest.mark.parametrize(("head", "pads"), [(16, 0), (24, 2), (40, 2), (64, 0), (72, 2), (80, 0)])
@pytest.mark.parametrize("engine", ENGINES)
def test_heads_whose_size_bf16_products_do_not_like_are_padded_with_zeros(engine: str, head: int, pads: int, tmp_path: Path) -> None:
    x = torch.randn(2, 10, 2 * head)
    path, one = written(SelfAttention(head), tmp_path / "any.onnx", x=x), tmp_path / "one.onnx"
    one_image_bf16(path, one)
    assert node_counts(path).get("Pad", 0) == 0 and node_counts(one).get("Pad", 0) == pads
    np.testing.assert_allclose(answer(engine, one, x=x[:1]), answer(engine, path, x=x[:1]), atol=1e-5)


@needs_onnxruntime
@pytest.mark.parametrize(("tokens", "weights"), [(1, "fp16"), (10, "int8"), (600, "fp32")])
def test_attention_goes_block_by_block_in_onnx_runtime(
    tokens: int, weights: WeightFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, tokens, 48)
    path, rewritten = written(SelfAttention(), tmp_path / "any.onnx", weights, x=x), tmp_path / "rewritten.onnx"
    assert onnxruntime_operators(path, rewritten)
    counts = node_counts(rewritten)
    assert counts["MultiHeadAttention"] == 1 and not {"Attention", "Reshape", "Transpose"} & counts.keys()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["any.onnx", "any.onnx.data", "rewritten.onnx"]
    np.testing.assert_allclose(answer("cpu", rewritten, x=x), answer("cpu", path, x=x), atol=1e-5)


@needs_onnxruntime
def test_a_graph_without_such_operators_is_not_rewritten(tmp_path: Path) -> None:
    masked = {"x": torch.randn(2, 10, 48), "mask": torch.rand(2, 10) > 0.5}
    plain = {"input": torch.randn(2, 10, 16)}
    for module, inputs in (SelfAttention(), masked), (nn.Sequential(nn.Linear(16, 16)), plain):
        path = written(module, tmp_path / f"{type(module).__name__}.onnx", **inputs)
        assert not onnxruntime_operators(path, tmp_path / "rewritten.onnx")
        assert not (tmp_path / "rewritten.onnx").exists()


@needs_onnxruntime
def test_what_else_reads_the_tensors_around_an_attention_still_reads_them(tmp_path: Path) -> None:
    class ReadBefore(SelfAttention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = (split_heads(layer(x), 2) for layer in self.projections[:3])
            return merge_heads(fused_attention(q, k, v)) + q.mean()

    class ReadAfter(SelfAttention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            z = fused_attention(*(split_heads(layer(x), 2) for layer in self.projections[:3]))
            return merge_heads(z) + z.mean()

    x, rewritten = torch.randn(2, 10, 48), tmp_path / "rewritten.onnx"
    path = written(ReadBefore(), tmp_path / "before.onnx", x=x)
    assert onnxruntime_operators(path, rewritten)
    np.testing.assert_allclose(answer("cpu", rewritten, x=x), answer("cpu", path, x=x), atol=1e-5)
    assert not onnxruntime_operators(written(ReadAfter(), tmp_path / "after.onnx", x=x), tmp_path / "none.onnx")


@needs_onnxruntime
@pytest.mark.parametrize("shift", [0.0, 5.0], ids=["int8", "uint8"])
def test_int8_products_are_the_same_in_onnx_runtime(shift: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shared(nn.Module):
        """Three layers that read one tensor, as queries, keys and values do; one of them has no bias."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(64, 64, bias=number > 0) for number in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([layer(x) for layer in self.layers], -1) + self.layers[1](x).sum(-1, keepdim=True)

    module = Shared().eval()
    samples = [{"x": torch.randn(2, 32, 64) + shift} for _ in range(3)]
    quantise(module, calibrate(module, samples[:2]))
    zeros = {layer.activation.zero.dtype for layer in module.layers}
    assert zeros == {torch.int8 if shift == 0 else torch.uint8}
    path, rewritten = written(module, tmp_path / "any.onnx", **samples[0]), tmp_path / "rewritten.onnx"
    assert onnxruntime_operators(path, rewritten)
    counts = node_counts(rewritten)
    assert counts["MatMulIntegerToFloat"] == counts.get("MatMul", 0) + 3 and "DequantizeLinear" not in counts
    with torch.no_grad():
        expected = module(**samples[2]).numpy()
    for instructions in "avx512_vnni", "avx2":
        monkeypatch.setattr(ort, "processor", lambda instructions=instructions: instructions)
        output = answer("cpu", rewritten, "int8", **samples[2])
        # A value in the middle of two steps may round either way.
        assert np.linalg.norm(output - expected) < 2e-3 * np.linalg.norm(expected)
