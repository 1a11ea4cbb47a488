"""fp16 and bf16 arithmetic for GPU engines: where it is used, where not, and how much it rounds."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from snoopi_rt.engines import installed, load_engine
from snoopi_rt.errors import InputError
from snoopi_rt.export.onnx_graphs.mixed_precision import GpuPrecision, simulate_gpu, to_gpu_precision
from snoopi_rt.export.onnx_graphs.write import write_graph
from snoopi_rt.kernels import attention

pytestmark = pytest.mark.skipif("cpu" not in installed(), reason="needs onnxruntime")


class Student(nn.Module):
    """One masked attention over a prompt, then a prediction read with alpha and sigma."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.norm = nn.LayerNorm(32)

    def forward(self, noise: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.q(self.norm(noise))[:, None], self.k(states)[:, None], self.v(states)[:, None]
        prediction = self.out(attention(q, k, v, mask)[:, 0])
        return (noise - 0.998 * prediction) / 0.063


@pytest.fixture
def graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    example = {"noise": torch.randn(2, 6, 32), "states": torch.randn(2, 5, 32), "mask": torch.ones(2, 5, dtype=torch.bool)}
    path, half = tmp_path / "any.onnx", tmp_path / "half.onnx"
    write_graph(Student(), example, ("latent",), {name: {0: "batch"} for name in example}, path, "fp16")
    to_gpu_precision(path, half)
    return path, half


def dtypes(path: Path) -> dict[str, int]:
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {value.name: value.type.tensor_type.elem_type for value in values} | {v.name: v.data_type for v in model.graph.initializer}


def test_products_are_fp16_and_inputs_outputs_and_the_reading_of_the_prediction_are_not(graphs: tuple[Path, Path]) -> None:
    graph, dtype_of = onnx.load(graphs[1]).graph, dtypes(graphs[1])
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "Softmax", "LayerNormalization")]
    assert len(products) >= 8
    assert {dtype_of[name] for node in products for name in (*node.input, *node.output) if name} == {TensorProto.FLOAT16}
    (reading,) = [node for node in graph.node if node.op_type == "Sub"]
    assert {dtype_of[name] for name in (*reading.input, *reading.output)} == {TensorProto.FLOAT}
    assert {dtype_of[value.name] for value in [*graph.input, *graph.output]} == {TensorProto.FLOAT, TensorProto.BOOL}


def test_it_reads_the_weights_of_the_graph_that_it_is_made_of(graphs: tuple[Path, Path]) -> None:
    folder = graphs[0].parent
    assert sorted(file.name for file in folder.iterdir()) == ["any.onnx", "any.onnx.data", "half.onnx"]
    stored = [value for value in onnx.load(graphs[1], load_external_data=False).graph.initializer if value.external_data]
    assert len(stored) == 4 and {value.data_type for value in stored} == {TensorProto.FLOAT16}


def inputs() -> dict[str, np.ndarray]:
    random = np.random.RandomState(0)
    return {
        "noise": random.standard_normal((2, 6, 32)).astype(np.float32),
        "states": random.standard_normal((2, 5, 32)).astype(np.float32),
        "mask": np.array([[True] * 3 + [False] * 2, [False] * 5]),
    }


# Measured 7.6e-5 and 5.6e-4, of a latent that is mostly the noise, which is not rounded. The types have 11 and 8 bits.
@pytest.mark.parametrize(("precision", "least", "most"), [("fp16", 2e-5, 2e-4), ("bf16", 2e-4, 2e-3)])
def test_it_rounds_and_no_more(graphs: tuple[Path, Path], tmp_path: Path, precision: GpuPrecision, least: float, most: float) -> None:
    wide, narrow, simulated = graphs[0], graphs[0].with_name(f"{precision}.onnx"), graphs[0].with_name("rounded.onnx")
    to_gpu_precision(wide, narrow, precision)
    simulate_gpu(narrow, simulated)
    exact, simulated_latent = (load_engine("cpu", path)(**inputs())["latent"] for path in (wide, simulated))
    assert np.isfinite(simulated_latent).all()  # the masked image too: the lowest fp32 number is no fp16
    assert least < np.linalg.norm(simulated_latent - exact) / np.linalg.norm(exact) < most


def test_what_is_rounded_is_what_the_half_graph_says(tmp_path: Path) -> None:
    """Two steps that everybody computes alike: a product that is rounded, then a sum that is."""
    x, y = (onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    weight = onnx.numpy_helper.from_array(np.array([1 / 3], np.float16), "w")
    nodes = [
        onnx.helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
        onnx.helper.make_node("Mul", ["x", "wide"], ["product"]),
        onnx.helper.make_node("Tanh", ["product"], ["prediction"]),
        onnx.helper.make_node("Sub", ["x", "prediction"], ["y"]),
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [y], [weight]), opset_imports=[onnx.helper.make_opsetid("", 23)])
    model.ir_version = 10
    onnx.save(model, tmp_path / "wide.onnx")
    to_gpu_precision(tmp_path / "wide.onnx", tmp_path / "half.onnx")
    simulate_gpu(tmp_path / "half.onnx", tmp_path / "rounded.onnx")
    values = np.random.RandomState(0).standard_normal(1000).astype(np.float32)
    product = (values.astype(np.float16).astype(np.float32) * np.float32(np.float16(1 / 3))).astype(np.float16)
    expected = values - np.tanh(product.astype(np.float32)).astype(np.float16).astype(np.float32)
    outputs = load_engine("cpu", tmp_path / "rounded.onnx")(x=values)["y"]
    # The engines' tanh may differ in the last bit of fp32, which moves a rounding now and then.
    assert (outputs != expected).mean() < 0.01 and np.abs(outputs - expected).max() < 1e-3


def test_a_graph_that_computes_with_integers_is_refused(tmp_path: Path) -> None:
    table = onnx.numpy_helper.from_array(np.ones((4, 3), np.int8), "table")
    ids = onnx.helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
    y = onnx.helper.make_tensor_value_info("y", TensorProto.INT8, ["n"])
    y.type.tensor_type.shape.dim.add().dim_value = 3
    graph = onnx.helper.make_graph([onnx.helper.make_node("Gather", ["table", "ids"], ["y"])], "g", [ids], [y], [table])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)]), tmp_path / "ids.onnx")
    with pytest.raises(InputError, match="int8 weights are read by other operators than DequantizeLinear"):
        to_gpu_precision(tmp_path / "ids.onnx", tmp_path / "half.onnx")
    assert not (tmp_path / "half.onnx").exists()


def test_an_output_that_a_product_makes_is_float32_again(tmp_path: Path) -> None:
    path, half = tmp_path / "any.onnx", tmp_path / "half.onnx"
    torch.manual_seed(0)
    x = torch.randn(2, 32)
    write_graph(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32, bias=False)), {"input": x}, ("y",), {}, path, "fp16")
    to_gpu_precision(path, half)
    wide, narrow = (load_engine("cpu", file)(input=x.numpy())["y"] for file in (path, half))
    assert narrow.dtype == np.float32 and 0 < np.abs(narrow - wide).max() < 1e-2
