"""int8 products: rounding, outlier channels, and a graph that computes what was simulated."""

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_nodes import node_counts
from torch import Tensor, nn

from snoopi_rt.engines import installed, load_engine
from snoopi_rt.export.onnx_graphs import quantise as module
from snoopi_rt.export.onnx_graphs.quantise import (
    QuantisedActivation,
    QuantisedConv,
    QuantisedLinear,
    calibrate,
    quantisable_layers,
    quantise,
)
from snoopi_rt.export.onnx_graphs.write import write_graph

WIDTH = 128
OUTLIERS = (7,)  # 1 % of the channels
LARGE = 30.0


class Network(nn.Module):
    """A convolution and two linear layers behind a norm whose scale some channels have large."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(16, WIDTH, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(WIDTH)
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.second = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            self.norm.weight[list(OUTLIERS)] *= gain

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(self.conv(x).flatten(2).transpose(1, 2))
        return self.second(nn.functional.gelu(self.first(rows)))


def samples(count: int, seed: int) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(1, 16, 8, 8, generator=random)} for _ in range(count)]


def error(network: nn.Module, original: nn.Module) -> float:
    """On inputs that nothing was calibrated on."""
    with torch.no_grad():
        pairs = [(network(**sample), original(**sample)) for sample in samples(4, seed=1)]
    return max(float((output - expected).norm() / expected.norm()) for output, expected in pairs)


def quantised(gain: float) -> tuple[Network, Network]:
    network, original = Network(gain).eval(), Network(gain).eval()
    quantise(network, calibrate(network, samples(8, seed=0)))
    return network, original


@pytest.mark.parametrize(("low", "high", "dtype"), [(-1.0, 3.0, torch.int8), (-0.17, 3.0, torch.uint8), (0.0, 2.0, torch.uint8)])
def test_values_in_range_move_by_half_a_step_and_others_to_its_end(low: float, high: float, dtype: torch.dtype) -> None:
    activation = QuantisedActivation(low, high)
    assert activation.zero.dtype == dtype
    x = torch.linspace(low, high, 1001)
    # The zero of uint8 is a whole step too, which may cut half a step off either end.
    assert (activation(x) - x).abs().max() <= activation.scale * (0.5 if dtype == torch.int8 else 1.001)
    assert float(activation(torch.tensor(0.0))) == 0  # what a convolution pads with
    assert float(activation(torch.tensor(10 * high))) == pytest.approx(high, abs=float(activation.scale))


def test_a_layer_that_only_ever_saw_zeros_stays_finite() -> None:
    layer = nn.Linear(16, 16)
    statistics = calibrate(nn.Sequential(layer), [{"input": torch.zeros(1, 4, 16)}])
    network = nn.Sequential(layer)
    quantise(network, statistics)
    assert torch.isfinite(network(torch.randn(1, 4, 16))).all()


@pytest.mark.parametrize("gain", [1.0, LARGE], ids=["plain", "1 % of the channels x 30"])
def test_int8_is_near_with_and_without_outlier_channels(gain: float) -> None:
    network, original = quantised(gain)
    assert isinstance(network.conv, QuantisedConv) and isinstance(network.second, QuantisedLinear)
    assert error(network, original) < 0.04


def test_smoothing_is_used_where_it_pays_and_is_what_saves_outlier_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    smoothed, original = quantised(LARGE)
    assert smoothed.first.activation.reciprocal is not None
    assert smoothed.first.activation.reciprocal[list(OUTLIERS)].max() < smoothed.first.activation.reciprocal.median() / 3
    even = quantised(1.0)[0].first.activation.reciprocal
    assert even is None or even.max() < 2 * even.min()
    monkeypatch.setattr(module, "SMOOTHING", ())
    assert error(quantised(LARGE)[0], original) > 3 * error(smoothed, original)


def test_layers_that_are_kept_or_were_not_seen_or_have_few_channels_are_left_as_they_are() -> None:
    network = Network()
    statistics = calibrate(network, samples(1, seed=0))
    errors = quantise(network, statistics, keep=["second"])
    assert errors.keys() == {"conv", "first"} and all(0 < value < 0.1 for value in errors.values())
    assert type(network.second) is nn.Linear
    assert quantisable_layers(nn.Sequential(nn.Conv2d(4, 64, 3), nn.Conv2d(64, 64, 3, groups=64), nn.Linear(64, 3))) == {}
    del statistics["first"]
    other = Network()
    assert "first" not in quantise(other, statistics) and type(other.first) is nn.Linear


@pytest.mark.parametrize("gain", [1.0, LARGE])
@pytest.mark.parametrize("engine", [name for name in installed() if name in ("cpu", "openvino")])
def test_a_graph_computes_what_was_simulated(engine: str, gain: float, tmp_path: Path) -> None:
    network, original = quantised(gain)
    path = tmp_path / "network.onnx"
    write_graph(network, {"x": torch.randn(2, 16, 8, 8)}, ("y",), {"x": {0: "batch"}}, path, "fp16")
    counts = node_counts(path)
    assert counts["QuantizeLinear"] == 3 and counts["DequantizeLinear"] == 3 + 3
    (sample,) = samples(1, seed=2)
    with torch.no_grad():
        simulated, exact = network(**sample), original(**sample)
    output = torch.from_numpy(load_engine(engine, path, "fp32")(x=sample["x"].numpy())["y"])
    # A value in the middle of two steps may round either way.
    assert float((output - simulated).norm() / simulated.norm()) < 0.3 * float((simulated - exact).norm() / exact.norm())


def test_weights_are_int8_in_the_file(tmp_path: Path) -> None:
    network, _ = quantised(1.0)
    path, plain = tmp_path / "network.onnx", tmp_path / "plain.onnx"
    narrow, wide = (
        sum(file.stat().st_size for file in write_graph(module, samples(1, 0)[0], ("y",), {}, written, weights))
        for module, written, weights in ((network, path, "fp16"), (Network(), plain, "fp32"))
    )
    matrices = sum(layer.weight.numel() for layer in quantisable_layers(Network()).values())
    assert narrow < 1.3 * matrices < wide / 3
    steps = np.rint(network.first.weight.steps.float().numpy())
    assert np.abs(steps).max() == 127
