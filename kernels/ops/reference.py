"""Attention with a negative prompt in plain torch: the meaning that exported graphs and kernels are compared with.

Shapes: q (B, H, N, d); k, v (B, H, T, d); masks (B, T) bool, True where a token counts, or None where all do; scale (B,).
Results (B, H, N, d), before the output projection. A branch without any token gives 0.
"""

import torch
from torch import Tensor

EPS = 1e-6  # of the squared norm of the negative's direction in `projected_attention`


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v.

    Written out, because on a CPU at these lengths the backward of torch's fused form was half of a training step, and because an exported
    graph must give 0, not NaN, for a fully masked row.
    """
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if mask is None:
        return torch.matmul(scores.softmax(-1), v)
    keep = mask[:, None, None, :]
    # The lowest finite number, not -inf: a row of -inf alone would be NaN. Such a row is then cleared.
    weights = scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(-1) * keep
    return torch.matmul(weights, v)


def nasa_attention(
    q: Tensor, k_pos: Tensor, v_pos: Tensor, mask_pos: Tensor | None, k_neg: Tensor, v_neg: Tensor, mask_neg: Tensor | None, scale: Tensor
) -> Tensor:
    """Z+ - scale * Z- (SNOOPI v3, equations 7 to 9). Equals Z+ bit for bit where scale is 0."""
    positive = attention(q, k_pos, v_pos, mask_pos)
    return positive - scale[:, None, None, None] * attention(q, k_neg, v_neg, mask_neg)


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
) -> Tensor:
    """Z+ - scale * max(0, <c, d>) / (|d|^2 + eps) * d with c = Z+ - Z0, d = Z- - Z0, over all heads of a query token; Z0 attends to "".

    Takes away only what the prompt shares with the negative beyond the empty prompt: an empty or unrelated negative is nearly a no-op.
    k_null and v_null: (1, H, T0, d), the empty prompt.
    """
    positive = attention(q, k_pos, v_pos, mask_pos)
    null = attention(q, k_null, v_null)
    direction = attention(q, k_neg, v_neg, mask_neg) - null
    shared = ((positive - null) * direction).sum((1, 3), keepdim=True).clamp(min=0)
    weight = shared / (direction.square().sum((1, 3), keepdim=True) + EPS)
    return positive - scale[:, None, None, None] * weight * direction
