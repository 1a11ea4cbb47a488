"""Linear layers and norms with a constant folded into them."""

import torch
from torch import Tensor, nn


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer with these tensors, not copies: weight (out, in) and bias (out,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def gated(layer: nn.Linear, gate: Tensor) -> nn.Linear:
    """`gate * layer(x)`; gate has `out` elements."""
    return linear(gate.view(-1, 1) * layer.weight, gate.flatten() * layer.bias)


def stacked(*layers: nn.Linear) -> nn.Linear:
    """One layer with the outputs of all `layers` concatenated."""
    return linear(torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers]))


def modulated_norm(norm: nn.LayerNorm, scale: Tensor, shift: Tensor) -> nn.LayerNorm:
    """`norm(x) * (1 + scale) + shift` for a norm without weights of its own."""
    folded = nn.LayerNorm(scale.shape[-1], eps=norm.eps, device="meta")
    folded.weight = nn.Parameter((1 + scale).flatten().detach(), requires_grad=False)
    folded.bias = nn.Parameter(shift.flatten().detach(), requires_grad=False)
    return folded
