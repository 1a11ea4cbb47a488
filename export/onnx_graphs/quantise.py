"""int8 products: linear layers and convolutions with quantised weights and activations.

A layer is replaced in the torch network, so that its graph can be simulated, and exported like any other module; in the graph it is
QuantizeLinear and DequantizeLinear around the product, which OpenVINO and TensorRT fuse. Activations have one fixed scale per layer, from
calibration, so that a batch never changes an image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

ROWS = 64
"""Input rows kept of each layer and sample: its smoothing is chosen on them."""
MIN_CHANNELS = 8
"""Layers of fewer channels cost nothing, and see the noise or give the prediction itself: they stay as they are."""
SMOOTHING = (0.5, 0.75)
"""Migration strengths of SmoothQuant (arXiv 2211.10438, equation 4) that are tried."""


class QuantisedActivation(nn.Module):
    """x rounded to 8 bits with one scale: int8 around zero, or uint8 with a zero point if values are mostly of one sign.

    `smooth` (C,) divides the channels first and is multiplied into the weights, so that outlier channels cost the others nothing
    (SmoothQuant).
    """

    def __init__(self, low: float, high: float, smooth: Tensor | None = None):
        super().__init__()
        if -low < 0.25 * high:
            scale, zero = (
                (high - min(low, 0.0)) / 255,
                torch.tensor(round(255 * -min(low, 0.0) / (high - min(low, 0.0))), dtype=torch.uint8),
            )
        else:
            scale, zero = max(-low, high) / 127, torch.tensor(0, dtype=torch.int8)
        self.scale, self.zero = nn.Buffer(torch.tensor(max(scale, 1e-12))), nn.Buffer(zero)
        self.reciprocal = None if smooth is None else nn.Buffer(1 / smooth)

    def forward(self, x: Tensor) -> Tensor:
        if self.reciprocal is not None:
            x = x * self.reciprocal
        if torch.compiler.is_exporting():
            steps = torch.onnx.ops.symbolic("QuantizeLinear", (x, self.scale, self.zero), dtype=self.zero.dtype, shape=x.shape)
            return torch.onnx.ops.symbolic("DequantizeLinear", (steps, self.scale, self.zero), dtype=torch.float32, shape=x.shape)
        limits, zero = torch.iinfo(self.zero.dtype), self.zero.float()
        return ((x / self.scale).round() + zero).clamp(limits.min, limits.max).sub(zero) * self.scale


class QuantisedWeight(nn.Module):
    """A weight in int8 with one scale per index of `axis`."""

    def __init__(self, weight: Tensor, axis: int):
        super().__init__()
        self.axis = axis
        others = [i for i in range(weight.ndim) if i != axis]
        scale = weight.abs().amax(others, keepdim=True).clamp(min=1e-12) / 127
        self.steps, self.scale = nn.Buffer((weight / scale).round().to(torch.int8)), nn.Buffer(scale.flatten())

    def forward(self) -> Tensor:
        if torch.compiler.is_exporting():
            values = (self.steps, self.scale)
            return torch.onnx.ops.symbolic("DequantizeLinear", values, {"axis": self.axis}, dtype=torch.float32, shape=self.steps.shape)
        shape = [-1 if i == self.axis else 1 for i in range(self.steps.ndim)]
        return self.steps.float() * self.scale.view(shape)


class QuantisedLinear(nn.Module):
    """nn.Linear as an int8 product."""

    def __init__(self, layer: nn.Linear, activation: QuantisedActivation):
        super().__init__()
        weight = layer.weight.detach()
        if activation.reciprocal is not None:
            weight = weight / activation.reciprocal
        # (in, out), as a graph's MatMul reads it: engines fuse no transposition behind DequantizeLinear.
        self.activation, self.weight, self.bias = activation, QuantisedWeight(weight.t().contiguous(), 1), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(self.activation(x), self.weight())
        return y if self.bias is None else y + self.bias


class QuantisedConv(nn.Module):
    """nn.Conv2d as an int8 product."""

    def __init__(self, layer: nn.Conv2d, activation: QuantisedActivation):
        super().__init__()
        self.activation, self.weight, self.bias = activation, QuantisedWeight(layer.weight.detach(), 0), layer.bias
        self.stride, self.padding = layer.stride, layer.padding

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(self.activation(x), self.weight(), self.bias, self.stride, self.padding)


@dataclass
class LayerStatistics:
    """The inputs of one layer during calibration."""

    low: float
    high: float
    channel_max: Tensor
    """The largest magnitude in each channel, (C,)."""
    rows: list[Tensor]
    """Some rows of each sample, (ROWS, C)."""


def quantisable_layers(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that can be quantised, by name: all but grouped convolutions and layers of fewer than MIN_CHANNELS."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    return {
        name: layer for name, layer in layers.items() if min(layer.weight.shape[:2]) >= MIN_CHANNELS and getattr(layer, "groups", 1) == 1
    }


def calibrate(network: nn.Module, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, LayerStatistics]:
    """The statistics of each layer's inputs, by its name, while the network runs on the samples."""
    statistics: dict[str, LayerStatistics] = {}

    def recording(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            rows = x.flatten(0, -2) if isinstance(module, nn.Linear) else x.transpose(1, -1).flatten(0, -2)
            low, high, channel_max = float(rows.min()), float(rows.max()), rows.abs().amax(0)
            kept = rows[torch.linspace(0, len(rows) - 1, min(ROWS, len(rows))).long()].clone()
            if known := statistics.get(name):
                known.low, known.high = min(known.low, low), max(known.high, high)
                known.channel_max = torch.maximum(known.channel_max, channel_max)
                known.rows.append(kept)
            else:
                statistics[name] = LayerStatistics(low, high, channel_max, [kept])

        return record

    handles = [layer.register_forward_pre_hook(recording(name)) for name, layer in quantisable_layers(network).items()]
    try:
        with torch.no_grad():
            for sample in tqdm(samples, desc="calibrate", unit="sample", leave=False):
                network(**sample)
    finally:
        for handle in handles:
            handle.remove()
    return statistics


@torch.no_grad()
def quantise(network: nn.Module, statistics: Mapping[str, LayerStatistics], keep: Sequence[str] = ()) -> dict[str, float]:
    """Quantises in place the layers that have statistics, except `keep`; returns each one's relative error on its kept rows.

    Smoothing is used if it lowers that error.
    """
    errors: dict[str, float] = {}
    # A layer that several steps of a student share has several names.
    names: dict[nn.Module, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for name, layer in quantisable_layers(network).items():
        if name not in statistics or name in keep:
            continue
        quantised, errors[name] = _quantised(layer, statistics[name])
        for path in names[layer]:
            parent, _, attribute = path.rpartition(".")
            setattr(network.get_submodule(parent), attribute, quantised)
    return errors


def _quantised(layer: nn.Linear | nn.Conv2d, statistics: LayerStatistics) -> tuple[nn.Module, float]:
    """The layer's quantised form and its relative error."""
    rows = torch.cat(statistics.rows)
    if isinstance(layer, nn.Conv2d):
        activation = QuantisedActivation(statistics.low, statistics.high)
        return QuantisedConv(layer, activation), float((activation(rows) - rows).norm() / rows.norm().clamp(min=1e-12))
    expected = torch.nn.functional.linear(rows, layer.weight)
    best: tuple[nn.Module, float] | None = None
    for strength in (0.0, *SMOOTHING):
        smooth, low, high = None, statistics.low, statistics.high
        if strength:
            channel_max = statistics.channel_max.clamp(min=1e-5)
            smooth = (channel_max**strength / layer.weight.abs().amax(0).clamp(min=1e-5) ** (1 - strength)).clamp(min=1e-5)
            scaled = statistics.channel_max / smooth
            # Of one sign if the layer's input is: only the largest magnitude of a channel is known, not its range.
            high = float(scaled.max())
            low = -high if -statistics.low >= 0.25 * statistics.high else float((rows / smooth).min())
        candidate = QuantisedLinear(layer, QuantisedActivation(low, high, smooth))
        candidate.bias = None
        error = float((candidate(rows) - expected).norm() / expected.norm().clamp(min=1e-12))
        # Smoothing is one more product in the graph unless the engine folds it: it must be worth it.
        if best is None or error < 0.9 * best[1]:
            best = candidate, error
    assert best is not None
    best[0].bias = layer.bias
    return best
