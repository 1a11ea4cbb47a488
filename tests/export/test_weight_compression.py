"""How weights are stored in a file, and that a graph computes with them what numpy does."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from onnx_nodes import node_counts
from torch import Tensor, nn

from snoopi_rt.engines import installed, load_engine
from snoopi_rt.export.onnx_graphs import weight_compression
from snoopi_rt.export.onnx_graphs.weight_compression import BLOCK, WeightFormat, block_scale, pack
from snoopi_rt.export.onnx_graphs.write import write_graph

ENGINES = [name for name in installed() if name in ("cpu", "openvino")]
# int8 and int4 steps in blocks; ONNX Runtime also rounds the other side of an 8 bit product to int8 in blocks.
NEAR: dict[WeightFormat, float] = {"fp32": 1e-5, "fp16": 5e-4, "int8": 0.012, "int4": 0.12}


class Network(nn.Module):
    """A table, a linear layer whose inputs fill `inputs` / BLOCK blocks, a convolution, and a norm."""

    def __init__(self, inputs: int = 2 * BLOCK) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(40, inputs)
        self.linear = nn.Linear(inputs, 96)
        self.conv = nn.Conv1d(96, 32, 3, padding=1)
        self.norm = nn.LayerNorm(32)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.linear(self.table(ids))
        return self.norm(self.conv(y.transpose(1, 2)).transpose(1, 2))


IDS = torch.arange(12).reshape(2, 6) * 3


def written(network: nn.Module, weights: WeightFormat, path: Path) -> Path:
    write_graph(network, {"ids": IDS}, ("y",), {"ids": {0: "batch", 1: "tokens"}}, path, weights)
    return path


def far(output: np.ndarray, expected: Tensor) -> float:
    reference = expected.detach().numpy()
    return float(np.linalg.norm(output - reference) / np.linalg.norm(reference))


def unpacked(steps: np.ndarray, scale: np.ndarray, bits: int, inputs: int) -> np.ndarray:
    """The weight (in, out) that packed steps stand for, as the operator's definition reads them."""
    if bits == 4:
        steps = np.stack([steps & 15, steps >> 4], -1).reshape(*steps.shape[:2], BLOCK)
    values = (steps.astype(np.float32) - 2 ** (bits - 1)) * scale.reshape(*steps.shape[:2], 1)
    return values.reshape(len(values), -1)[:, :inputs].T


@pytest.mark.parametrize("inputs", [BLOCK, 3 * BLOCK, 100])
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_are_the_weights_to_half_a_step(bits: int, inputs: int) -> None:
    weight = np.random.RandomState(0).standard_normal((inputs, 24)).astype(np.float32)
    weight[:, 0] = 0
    steps, scale = pack(weight, bits), block_scale(weight, bits)
    assert steps.dtype == np.uint8 and steps.shape == (24, -(-inputs // BLOCK), BLOCK * bits // 8)
    again = unpacked(steps, scale, bits, inputs)
    assert np.abs(again - weight).max() <= scale.max() / 2 * 1.001
    assert not again[:, 0].any()
    assert np.abs(again - weight).max() > 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("inputs", [2 * BLOCK, 100])  # 100: the last block is not full
@pytest.mark.parametrize("weights", NEAR)
def test_every_format_is_close_on_every_engine(weights: WeightFormat, inputs: int, engine: str, tmp_path: Path) -> None:
    network = Network(inputs)
    path = written(network, weights, tmp_path / "network.onnx")
    output = load_engine(engine, path, "fp32")(ids=IDS.numpy())["y"]
    assert far(output, network(IDS)) < NEAR[weights]
    if weights != "fp32":
        assert far(output, network(IDS)) > 1e-6


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("int4", 4)])
def test_a_packed_product_is_numpys_with_the_unpacked_weight(engine: str, weights: WeightFormat, bits: int, tmp_path: Path) -> None:
    network = Network()
    weight = network.linear.weight.detach().numpy().T.copy()
    weight[:, 5] *= 30  # a large output channel has blocks of its own
    with torch.no_grad():
        network.linear.weight.copy_(torch.from_numpy(weight.T))
        again = Network()
        again.linear.weight.copy_(torch.from_numpy(unpacked(pack(weight, bits), block_scale(weight, bits), bits, len(weight)).T))
        again.linear.bias.copy_(network.linear.bias)
    path = written(network, weights, tmp_path / "network.onnx")
    counts = node_counts(path)
    assert counts["MatMulNBits"] == 1 and "MatMul" not in counts
    output = load_engine(engine, path, "fp32")(ids=IDS.numpy())["y"]
    assert far(output, again(IDS)) < (0.01 if (engine, bits) == ("cpu", 8) else 1e-3)


def test_small_tensors_stay_fp32_and_large_ones_are_what_was_asked_for(tmp_path: Path) -> None:
    dtypes = {
        weights: {
            value.name: value.data_type for value in onnx.load(written(Network(), weights, tmp_path / f"{weights}.onnx")).graph.initializer
        }
        for weights in NEAR
    }
    assert set(dtypes["fp32"].values()) == {TensorProto.FLOAT}
    assert {TensorProto.FLOAT16, TensorProto.FLOAT} == set(dtypes["fp16"].values())
    assert TensorProto.UINT8 in dtypes["int4"].values()
    for weights in NEAR:
        assert all(dtype == TensorProto.FLOAT for name, dtype in dtypes[weights].items() if name.startswith("norm"))


def test_a_weight_that_fp16_cannot_hold_stays_fp32(tmp_path: Path) -> None:
    network = Network()
    with torch.no_grad():
        network.conv.weight[0, 0, 0] = 1e5
    path = written(network, "fp16", tmp_path / "network.onnx")
    dtypes = {value.name: value.data_type for value in onnx.load(path).graph.initializer}
    assert dtypes["conv.weight"] == TensorProto.FLOAT
    assert far(load_engine("cpu", path, "fp32")(ids=IDS.numpy())["y"], network(IDS)) < NEAR["fp16"]


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_are_int8_steps_already_stay_so_without_loss(engine: str, tmp_path: Path) -> None:
    network = Network()
    with torch.no_grad():
        for weight in (network.table.weight, network.linear.weight):
            steps = torch.randint(-127, 128, weight.shape, generator=torch.Generator().manual_seed(1)).float()
            steps[:, 0] = 127
            weight.copy_(steps * torch.linspace(0.001, 0.002, len(weight))[:, None])
    path = written(network, "fp16", tmp_path / "network.onnx")
    assert sum(value.data_type == TensorProto.INT8 for value in onnx.load(path).graph.initializer) == 2
    output = load_engine(engine, path, "fp32")(ids=IDS.numpy())["y"]
    assert far(output, network(IDS)) < NEAR["fp16"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weights", NEAR)
def test_large_weights_are_in_a_file_of_their_own(weights: WeightFormat, engine: str, tmp_path: Path) -> None:
    network = Network()
    path = written(network, weights, tmp_path / "network.onnx")
    data = path.with_name("network.onnx.data")
    assert data.stat().st_size > path.stat().st_size / 2
    assert far(load_engine(engine, path, "fp32")(ids=IDS.numpy())["y"], network(IDS)) < NEAR[weights]
    again = tmp_path / "again"
    again.mkdir()
    written(network, weights, again / "network.onnx")
    assert (again / "network.onnx").read_bytes() == path.read_bytes() and (again / data.name).read_bytes() == data.read_bytes()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_very_large_table_is_rounded_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    monkeypatch.setattr(weight_compression, "LARGE_TABLE", 1000)
    monkeypatch.setattr(weight_compression, "ROWS", 16)
    network = Network()
    path = written(network, "int8", tmp_path / "table.onnx")
    kinds = {value.name: value.data_type for value in onnx.load(path, load_external_data=False).graph.initializer}
    assert kinds["table.weight.int8"] == TensorProto.INT8
    assert 0 < far(load_engine(engine, path)(ids=IDS.numpy())["y"], network(IDS)) < 1.5 * NEAR["int8"]
