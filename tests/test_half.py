"""fp16 arithmetic for engines on a GPU: where it is and where it is not, and what it costs."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from snoopi_rt.engines import installed, load_engine
from snoopi_rt.export.graphs import write
from snoopi_rt.export.graphs.half import half_arithmetic
from snoopi_rt.export.graphs.write import write_graph
from snoopi_rt.kernels import attention

pytestmark = pytest.mark.skipif("cpu" not in installed(), reason="needs onnxruntime")


class Student(nn.Module):
    """One masked attention over a prompt, then an answer read with alpha and sigma."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.norm = nn.LayerNorm(32)

    def forward(self, noise: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.q(self.norm(noise))[:, None], self.k(states)[:, None], self.v(states)[:, None]
        answer = self.out(attention(q, k, v, mask)[:, 0])
        return (noise - 0.998 * answer) / 0.063


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setattr(write, "INLINE", 2**10)
    example = {"noise": torch.randn(2, 6, 32), "states": torch.randn(2, 5, 32), "mask": torch.ones(2, 5, dtype=torch.bool)}
    path, half = tmp_path / "any.onnx", tmp_path / "half.onnx"
    write_graph(Student(), example, ("latent",), {name: {0: "batch"} for name in example}, path, "fp16")
    half_arithmetic(path, half)
    return path, half


def kinds(path: Path) -> dict[str, int]:
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {value.name: value.type.tensor_type.elem_type for value in values} | {v.name: v.data_type for v in model.graph.initializer}


def test_products_are_fp16_and_inputs_outputs_and_the_reading_of_the_answer_are_not(made: tuple[Path, Path]) -> None:
    graph, found = onnx.load(made[1]).graph, kinds(made[1])
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "Softmax", "LayerNormalization")]
    assert len(products) >= 8
    assert {found[name] for node in products for name in (*node.input, *node.output) if name} == {TensorProto.FLOAT16}
    (reading,) = [node for node in graph.node if node.op_type == "Sub"]
    assert {found[name] for name in (*reading.input, *reading.output)} == {TensorProto.FLOAT}
    assert {found[value.name] for value in [*graph.input, *graph.output]} == {TensorProto.FLOAT, TensorProto.BOOL}


def test_it_reads_the_weights_of_the_graph_that_it_is_made_of(made: tuple[Path, Path]) -> None:
    folder = made[0].parent
    assert sorted(file.name for file in folder.iterdir()) == ["any.onnx", "any.onnx.data", "half.onnx"]
    stored = [value for value in onnx.load(made[1], load_external_data=False).graph.initializer if value.external_data]
    assert len(stored) == 4 and {value.data_type for value in stored} == {TensorProto.FLOAT16}


def test_it_rounds_and_no_more(made: tuple[Path, Path]) -> None:
    random = np.random.RandomState(0)
    given = {
        "noise": random.standard_normal((2, 6, 32)).astype(np.float32),
        "states": random.standard_normal((2, 5, 32)).astype(np.float32),
        "mask": np.array([[True] * 3 + [False] * 2, [False] * 5]),
    }
    wide, half = (load_engine("cpu", path)(**given)["latent"] for path in made)
    assert np.isfinite(half).all()  # the masked image too: the lowest fp32 number is no fp16
    # Measured 1.6e-5, since ONNX Runtime leaves out roundings between operators that it computes in fp32; fp16 has 11 bits, 5e-4.
    error = np.linalg.norm(half - wide) / np.linalg.norm(wide)
    assert 1e-6 < error < 1e-3


def test_an_output_that_a_product_makes_is_float32_again(tmp_path: Path) -> None:
    path, half = tmp_path / "any.onnx", tmp_path / "half.onnx"
    torch.manual_seed(0)
    x = torch.randn(2, 32)
    write_graph(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32, bias=False)), {"input": x}, ("y",), {}, path, "fp16")
    half_arithmetic(path, half)
    wide, narrow = (load_engine("cpu", each)(input=x.numpy())["y"] for each in (path, half))
    assert narrow.dtype == np.float32 and 0 < np.abs(narrow - wide).max() < 1e-2
