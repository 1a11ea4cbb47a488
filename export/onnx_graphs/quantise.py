"""int8 products: linear layers and convolutions whose weights and activations are int8 steps.

A layer is replaced in the torch network, so that what a graph computes can be simulated, and exported like any other module; in the graph
it is QuantizeLinear and DequantizeLinear around the product, which OpenVINO and TensorRT fuse. Activations have one fixed step size a
layer, found by calibration, so a batch never changes an image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

ROWS = 64  # input rows kept of each layer and case, on which its settings are chosen
CHANNELS = 8
STRENGTHS = (0.5, 0.75)  # of SmoothQuant, arXiv 2211.10438, equation 4


class Activation(nn.Module):
    """Rounds x to 256 steps of one size: int8 around zero, or uint8 with a zero point where values are mostly of one sign.

    `smooth` (C,) divides the channels first and is multiplied into the weights: outlier channels then cost the others nothing.
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


class Steps(nn.Module):
    """A weight as int8 steps with one size for each index of `axis`."""

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


class QuantizedLinear(nn.Module):
    """nn.Linear as an int8 product."""

    def __init__(self, layer: nn.Linear, activation: Activation):
        super().__init__()
        weight = layer.weight.detach()
        if activation.reciprocal is not None:
            weight = weight / activation.reciprocal
        # (in, out), as a graph's MatMul reads it: engines fuse no transposition behind the steps.
        self.activation, self.weight, self.bias = activation, Steps(weight.t().contiguous(), 1), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(self.activation(x), self.weight())
        return y if self.bias is None else y + self.bias


class QuantizedConv(nn.Module):
    """nn.Conv2d as an int8 product."""

    def __init__(self, layer: nn.Conv2d, activation: Activation):
        super().__init__()
        self.activation, self.weight, self.bias = activation, Steps(layer.weight.detach(), 0), layer.bias
        self.stride, self.padding = layer.stride, layer.padding

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(self.activation(x), self.weight(), self.bias, self.stride, self.padding)


@dataclass
class Seen:
    """What went into one layer: the range of all values, the largest of each channel, and some rows."""

    low: float
    high: float
    channel_max: Tensor
    rows: list[Tensor]


def layers(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that can be quantised, by name; not those of a few channels, which cost nothing and see the noise or the answer itself."""
    found = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    return {name: layer for name, layer in found.items() if min(layer.weight.shape[:2]) >= CHANNELS and getattr(layer, "groups", 1) == 1}


def calibrate(network: nn.Module, cases: Sequence[Mapping[str, Tensor]]) -> dict[str, Seen]:
    """What goes into each layer while the network runs on the cases."""
    seen: dict[str, Seen] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].detach()
            rows = x.flatten(0, -2) if isinstance(module, nn.Linear) else x.transpose(1, -1).flatten(0, -2)
            low, high, largest = float(rows.min()), float(rows.max()), rows.abs().amax(0)
            kept = rows[torch.linspace(0, len(rows) - 1, min(ROWS, len(rows))).long()].clone()
            if before := seen.get(name):
                before.low, before.high = min(before.low, low), max(before.high, high)
                before.channel_max = torch.maximum(before.channel_max, largest)
                before.rows.append(kept)
            else:
                seen[name] = Seen(low, high, largest, [kept])

        return record

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers(network).items()]
    try:
        with torch.no_grad():
            for case in tqdm(cases, desc="calibrate", unit="case", leave=False):
                network(**case)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
def quantise(network: nn.Module, seen: Mapping[str, Seen], keep: Sequence[str] = ()) -> dict[str, float]:
    """Replaces the layers that were seen, except `keep`, in place; gives each one's relative error on its kept rows.

    Smoothing is used where it lowers that error.
    """
    errors: dict[str, float] = {}
    # A layer that several steps share has several names.
    places: dict[nn.Module, list[str]] = {}
    for place, module in network.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(place)
    for name, layer in layers(network).items():
        if name not in seen or name in keep:
            continue
        quantised, errors[name] = _best(layer, seen[name])
        for place in places[layer]:
            parent, _, attribute = place.rpartition(".")
            setattr(network.get_submodule(parent), attribute, quantised)
    return errors


def _best(layer: nn.Linear | nn.Conv2d, seen: Seen) -> tuple[nn.Module, float]:
    if isinstance(layer, nn.Conv2d):
        activation = Activation(seen.low, seen.high)
        rows = torch.cat(seen.rows)
        return QuantizedConv(layer, activation), float((activation(rows) - rows).norm() / rows.norm().clamp(min=1e-12))
    rows = torch.cat(seen.rows)
    wanted = torch.nn.functional.linear(rows, layer.weight)
    best: tuple[nn.Module, float] | None = None
    for strength in (0.0, *STRENGTHS):
        smooth, low, high = None, seen.low, seen.high
        if strength:
            largest = seen.channel_max.clamp(min=1e-5)
            smooth = (largest**strength / layer.weight.abs().amax(0).clamp(min=1e-5) ** (1 - strength)).clamp(min=1e-5)
            scaled = seen.channel_max / smooth
            # Of one sign if the layer's input is: the range of a channel is not known, its largest value is.
            high = float(scaled.max())
            low = -high if -seen.low >= 0.25 * seen.high else float((rows / smooth).min())
        candidate = QuantizedLinear(layer, Activation(low, high, smooth))
        candidate.bias = None
        error = float((candidate(rows) - wanted).norm() / wanted.norm().clamp(min=1e-12))
        # Smoothing is one more product in the graph unless the engine folds it: a gain must be worth it.
        if best is None or error < 0.9 * best[1]:
            best = candidate, error
    assert best is not None
    best[0].bias = layer.bias
    return best
