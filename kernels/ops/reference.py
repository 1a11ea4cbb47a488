"""Attention with a negative prompt in plain torch: the reference that exported graphs and kernels are compared with.

Shapes: q (B, H, N, d); k, v (B, H, T, d); masks (B, T) bool, True where a token counts, or None if all do; scale (B,).
Results are (B, H, N, d), before the output projection. A branch without any token gives 0. Where scale is 0 every guidance equals the
positive attention bit for bit. `attention` is the implementation of softmax(q k^T / sqrt(d)) v that a guidance is built from: the function
of that name, `fused_attention` or `transposed_attention`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

EPS = 1e-6  # of the squared norm of the negative's direction in `projected_attention`


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v.

    Written out, because the backward pass of torch's fused operator takes half of a training step on a CPU at these lengths, and because an
    exported graph must give 0, not NaN, for a fully masked row.
    """
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if mask is None:
        return torch.matmul(scores.softmax(-1), v)
    keep = mask[:, None, None, :]
    # The lowest finite number, not -inf: a row of -inf alone would be NaN. Such a row is then cleared.
    weights = scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(-1) * keep
    return torch.matmul(weights, v)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attention` as torch's own operator, which from opset 23 on is one Attention node in an exported graph."""
    if k.shape[0] != q.shape[0]:
        k, v = (x.expand(q.shape[0], -1, -1, -1) for x in (k, v))
    if mask is not None:
        # ONNX Runtime refuses to broadcast a mask over the queries; and only a bool mask gives 0 for a fully masked row.
        mask = mask[:, None, None, :].expand(-1, -1, q.shape[2], -1)
    # The scale is explicit so that the graph states it: heads may be padded there, which would change the default.
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=q.shape[-1] ** -0.5)


def transposed_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attention` with its scores transposed, (T, N), for many queries and few keys.

    A softmax over rows of 20 tokens is all overhead; over columns it vectorises along the queries. On PixArt's layers a negative prompt of
    20 tokens then takes OpenVINO a sixth of the time (tools/attention_layouts.py).
    """
    scores = torch.matmul(k * k.shape[-1] ** -0.5, q.transpose(-1, -2))
    if mask is None:
        weights = scores.softmax(-2)
    else:
        keep = mask[:, None, :, None]
        weights = scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(-2) * keep
    return torch.matmul(weights.transpose(-1, -2), v)


def nasa_attention(
    q: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    mask_pos: Tensor | None,
    k_neg: Tensor,
    v_neg: Tensor,
    mask_neg: Tensor | None,
    scale: Tensor,
    attention: Callable[..., Tensor] = attention,
) -> Tensor:
    """Z+ - scale * Z- (SNOOPI v3, equations 7 to 9)."""
    # Attention is linear in the values: scaling these few is cheaper than scaling the many outputs.
    return attention(q, k_pos, v_pos, mask_pos) + attention(q, k_neg, -_per_image(scale) * v_neg, mask_neg)


def nag_attention(
    q: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    mask_pos: Tensor | None,
    k_neg: Tensor,
    v_neg: Tensor,
    mask_neg: Tensor | None,
    scale: Tensor,
    tau: float,
    alpha: float,
    attention: Callable[..., Tensor] = attention,
) -> Tensor:
    """alpha * Zn + (1 - alpha) * Z+, Zn being Zt = Z+ + scale * (Z+ - Z-) with |Zt| capped at tau |Z+| (NAG, equations 7 to 10).

    scale is the paper's phi; the authors' code says nag_scale = phi + 1. |.| is the L1 norm of a query token over all heads. tau >= 1.
    """
    positive = attention(q, k_pos, v_pos, mask_pos)
    guided = positive + _per_image(scale) * (positive - attention(q, k_neg, v_neg, mask_neg))
    # Means instead of sums: the same ratio, and no overflow in fp16.
    size, cap = guided.abs().mean((1, 3), keepdim=True), tau * positive.abs().mean((1, 3), keepdim=True)
    guided = torch.where(size > cap, guided * (cap / size), guided)
    # Not alpha * Zn + (1 - alpha) * Z+, which rounds where scale is 0.
    return positive + alpha * (guided - positive)


def vsf_attention(
    q: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    mask_pos: Tensor | None,
    k_neg: Tensor,
    v_neg: Tensor,
    mask_neg: Tensor | None,
    scale: Tensor,
    attention: Callable[..., Tensor] = attention,
) -> Tensor:
    """softmax(q [K+; K-]^T / sqrt(d)) [V+; -scale * V-], one softmax over both prompts (VSF, ICLR 2026); Z+ where scale is 0.

    The select belongs to the guidance: without it a negative prompt at scale 0 would still take weight from the prompt.
    """
    positive = attention(q, k_pos, v_pos, mask_pos)
    mask = None
    if mask_pos is not None or mask_neg is not None:
        mask = torch.cat([_all_tokens(k_pos) if mask_pos is None else mask_pos, _all_tokens(k_neg) if mask_neg is None else mask_neg], 1)
    flipped = attention(q, torch.cat([k_pos, k_neg], 2), torch.cat([v_pos, -_per_image(scale) * v_neg], 2), mask)
    return torch.where(_per_image(scale) == 0, positive, flipped)


def projected_attention(
    q: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    mask_pos: Tensor | None,
    k_neg: Tensor,
    v_neg: Tensor,
    mask_neg: Tensor | None,
    scale: Tensor,
    k_null: Tensor,
    v_null: Tensor,
    attention: Callable[..., Tensor] = attention,
) -> Tensor:
    """Z+ - scale * max(0, <c, d>) / (|d|^2 + eps) * d with c = Z+ - Z0, d = Z- - Z0, over all heads of a query token; Z0 attends to "".

    Removes only what the prompt shares with the negative beyond the empty prompt: an empty or unrelated negative is nearly a no-op.
    k_null and v_null: (1, H, T0, d), the empty prompt.
    """
    positive = attention(q, k_pos, v_pos, mask_pos)
    null = attention(q, k_null, v_null)
    direction = attention(q, k_neg, v_neg, mask_neg) - null
    overlap = ((positive - null) * direction).sum((1, 3), keepdim=True).clamp(min=0)
    weight = overlap / (direction.square().sum((1, 3), keepdim=True) + EPS)
    return positive - _per_image(scale) * weight * direction


def _per_image(scale: Tensor) -> Tensor:
    return scale[:, None, None, None]


def _all_tokens(k: Tensor) -> Tensor:
    return torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
