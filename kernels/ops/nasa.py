"""NASA attention on a GPU through the Triton kernels: `nasa_attention` in one pass, with gradients. Needs triton.

It has the signature of `reference.nasa_attention` and replaces it wherever torch runs: in diffusers' networks through
`snoopi_rt.export.attention.GuidedAttention`, in training, in evaluation.
"""

import math
import os
from typing import Any

import torch
from torch import Tensor

from snoopi_rt.kernels.nasa_kernel import dk_dv_kernel, dq_kernel, forward_kernel

MAX_HEAD_DIM = 256
MIN_BLOCK = 16
"""The least that tl.dot takes in every direction."""


def fused_nasa_attention(
    q: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    mask_pos: Tensor | None,
    k_neg: Tensor,
    v_neg: Tensor,
    mask_neg: Tensor | None,
    scale: Tensor,
) -> Tensor:
    """Z+ - scale * Z- (SNOOPI v3, equations 7 to 9); shapes as in `reference`. The result lies in memory as (B, N, H, d): merging its heads
    is a view.

    fp16, bf16 or fp32, all alike; heads up to 256; any lengths. Differentiable in everything but the masks. Raises ValueError for other
    shapes and dtypes, and for tensors on a device that the kernels do not run on.
    """
    _check(q, k_pos, v_pos, mask_pos, k_neg, v_neg, mask_neg, scale)
    return _Nasa.apply(q, k_pos, v_pos, mask_pos, k_neg, v_neg, mask_neg, scale)


class _Nasa(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k_pos: Tensor,
        v_pos: Tensor,
        mask_pos: Tensor | None,
        k_neg: Tensor,
        v_neg: Tensor,
        mask_neg: Tensor | None,
        scale: Tensor,
    ) -> Tensor:
        q, k_pos, v_pos, k_neg, v_neg = map(_last_axis_contiguous, (q, k_pos, v_pos, k_neg, v_neg))
        # The kernels know no strides of masks, and an expanded one has none.
        mask_pos, mask_neg = (None if mask is None else mask.contiguous() for mask in (mask_pos, mask_neg))
        factor = -scale.float()
        o = _empty_rows_first(q)
        batch, heads, seqlen_q, head_dim = q.shape
        meta = meta_parameters(head_dim, q.dtype, q.device.type == "cpu")
        forward_kernel[(-(-seqlen_q // meta["BLOCK_M"]), batch * heads)](
            *_pointers(q, k_pos, v_pos, mask_pos, k_neg, v_neg, mask_neg),
            factor, o, _strides(o), heads, seqlen_q, _qk_scale(head_dim),
            MASKED_POS=mask_pos is not None, MASKED_NEG=mask_neg is not None, **meta,
        )  # fmt: skip
        ctx.save_for_backward(q, k_pos, v_pos, mask_pos, k_neg, v_neg, mask_neg, factor)
        ctx.scale_dtype = scale.dtype
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k_pos, v_pos, mask_pos, k_neg, v_neg, mask_neg, factor = ctx.saved_tensors
        batch, heads, seqlen_q, head_dim = q.shape
        do, meta = _last_axis_contiguous(do), meta_parameters(head_dim, q.dtype, q.device.type == "cpu", backward=True)
        dq = _empty_rows_first(q)
        lse, delta = torch.empty(2, 2, batch, heads, seqlen_q, dtype=torch.float32, device=q.device)
        qk_scale, sm_scale = _qk_scale(head_dim), head_dim**-0.5
        dq_kernel[(-(-seqlen_q // meta["BLOCK_M"]), batch * heads)](
            *_pointers(q, k_pos, v_pos, mask_pos, k_neg, v_neg, mask_neg),
            factor, do, _strides(do), dq, _strides(dq), lse, delta, heads, seqlen_q, qk_scale, sm_scale,
            MASKED_POS=mask_pos is not None, MASKED_NEG=mask_neg is not None, **meta,
        )  # fmt: skip
        gradients = []
        branches = ((k_pos, v_pos, mask_pos, torch.ones_like(factor)), (k_neg, v_neg, mask_neg, factor))
        for branch, (k, v, mask, branch_factor) in enumerate(branches):
            dk, dv = _empty_rows_first(k), _empty_rows_first(v)
            dk_dv_kernel[(-(-k.shape[2] // meta["BLOCK_N"]), batch * heads)](
                q, _strides(q), k, _strides(k), v, _strides(v), k if mask is None else mask, k.shape[2],
                branch_factor, do, _strides(do), lse[branch], delta[branch], dk, _strides(dk), dv, _strides(dv),
                heads, seqlen_q, qk_scale, sm_scale, MASKED=mask is not None, **meta,
            )  # fmt: skip
            gradients.append((dk, dv))
        (dk_pos, dv_pos), (dk_neg, dv_neg) = gradients
        # The output has -scale * Z-: the sum over an image of <Z-, do>.
        dscale = -delta[1].sum((1, 2)).to(ctx.scale_dtype)
        return dq, dk_pos, dv_pos, None, dk_neg, dv_neg, None, dscale


def _check(
    q: Tensor, k_pos: Tensor, v_pos: Tensor, mask_pos: Tensor | None, k_neg: Tensor, v_neg: Tensor, mask_neg: Tensor | None, scale: Tensor
) -> None:
    batch, heads, _, head_dim = q.shape
    for name, k, v, mask in (("prompt", k_pos, v_pos, mask_pos), ("negative", k_neg, v_neg, mask_neg)):
        if k.shape != v.shape or (k.shape[0], k.shape[1], k.shape[3]) != (batch, heads, head_dim):
            raise ValueError(f"keys {tuple(k.shape)} and values {tuple(v.shape)} of the {name} do not fit queries {tuple(q.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, k.shape[2])):
            raise ValueError(f"the {name}'s mask must be bool {(batch, k.shape[2])}, is {mask.dtype} {tuple(mask.shape)}")
    if scale.shape != (batch,):
        raise ValueError(f"scale must be ({batch},), is {tuple(scale.shape)}")
    if {x.dtype for x in (k_pos, v_pos, k_neg, v_neg)} != {q.dtype} or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError("queries, keys and values must be of one dtype: fp16, bf16 or fp32")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"a head of {head_dim} is too large, at most {MAX_HEAD_DIM}")
    if q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("the NASA kernel runs on a GPU; on a CPU only in Triton's interpreter (TRITON_INTERPRET=1)")


def _pointers(q: Tensor, *branches: Any) -> tuple:
    """The first arguments of forward_kernel and dq_kernel. A mask that is None is never read: any pointer will do."""
    arguments: list[Any] = [q, _strides(q)]
    for k, v, mask in (branches[:3], branches[3:]):
        arguments += [k, _strides(k), v, _strides(v), k if mask is None else mask, k.shape[2]]
    return tuple(arguments)


def meta_parameters(head_dim: int, dtype: torch.dtype, interpreted: bool = False, backward: bool = False) -> dict[str, Any]:
    """The constants that a kernel is compiled with for heads of this size and dtype, and its number of warps."""
    block_d = max(MIN_BLOCK, 1 << (head_dim.bit_length() - 1))
    rest = 0 if block_d >= head_dim else max(MIN_BLOCK, 1 << (head_dim - block_d - 1).bit_length())
    # So that no register spills: 226 of a thread's 255 for bf16 heads of 72, forward, compiled for sm_90.
    small = backward or head_dim > 96 or dtype == torch.float32
    precision = "ieee" if dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32 else "tf32"
    return {
        "PRECISION": "wide" if interpreted and dtype == torch.bfloat16 else precision,
        "BLOCK_M": 64 if small else 128,
        "BLOCK_N": 32 if small else 64,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "REST": rest,
        "num_warps": 8,
    }


def _qk_scale(head_dim: int) -> float:
    """1 / sqrt(d) for a softmax to base 2."""
    return head_dim**-0.5 * math.log2(math.e)


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _last_axis_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_rows_first(x: Tensor) -> Tensor:
    """An empty tensor (B, H, N, d) like x that lies in memory as (B, N, H, d)."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
