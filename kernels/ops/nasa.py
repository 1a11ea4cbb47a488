"""NASA attention through the Triton kernels, with gradients: `nasa_attention` in one pass, for a GPU. Needs triton.

The signature and the meaning are those of `reference.nasa_attention`, so it stands in its place wherever torch runs: in diffusers'
networks through `snoopi_rt.export.attention.GuidedAttention`, in training, in evaluation.
"""

import math
import os
from typing import Any

import torch
from torch import Tensor

from snoopi_rt.kernels.nasa_kernel import forward_kernel, key_gradient_kernel, query_gradient_kernel

LARGEST_HEAD = 256
SMALLEST = 16
"""What the matrix units take at least in every direction."""


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
    """Z+ - scale * Z- (SNOOPI v3, equations 7 to 9); shapes as in `reference`, the result's heads lie so that merging them is a view.

    fp16, bf16 or fp32, all alike; heads up to 256; any lengths. Differentiable in everything but the masks. Raises ValueError for other
    shapes and dtypes, and for tensors that no kernel reaches.
    """
    _check(q, k_pos, v_pos, mask_pos, k_neg, v_neg, mask_neg, scale)
    return _Nasa.apply(q, k_pos, v_pos, mask_pos, k_neg, v_neg, mask_neg, scale)


class _Nasa(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        q, k_pos, v_pos, mask_pos, k_neg, v_neg, mask_neg, scale = given
        q, k_pos, v_pos, k_neg, v_neg = map(_dense, (q, k_pos, v_pos, k_neg, v_neg))
        # The kernels know no strides of masks, and an expanded one has none.
        mask_pos, mask_neg = (None if mask is None else mask.contiguous() for mask in (mask_pos, mask_neg))
        factor = -scale.float()
        out = _rows_first(q)
        batch, heads, queries, size = q.shape
        settings = blocks(size, q.dtype, q.device.type == "cpu")
        forward_kernel[(-(-queries // settings["QUERIES"]), batch * heads)](
            *_inputs(q, k_pos, v_pos, mask_pos, k_neg, v_neg, mask_neg),
            factor, out, _strides(out), heads, queries, _to_log2(size),
            MASKED_POS=mask_pos is not None, MASKED_NEG=mask_neg is not None, **settings,
        )  # fmt: skip
        ctx.save_for_backward(q, k_pos, v_pos, mask_pos, k_neg, v_neg, mask_neg, factor)
        ctx.scale_type = scale.dtype
        return out

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:
        q, k_pos, v_pos, mask_pos, k_neg, v_neg, mask_neg, factor = ctx.saved_tensors
        batch, heads, queries, size = q.shape
        up, settings = _dense(up), blocks(size, q.dtype, q.device.type == "cpu", backward=True)
        down = _rows_first(q)
        levels, shares = torch.empty(2, 2, batch, heads, queries, dtype=torch.float32, device=q.device)
        grid = (-(-queries // settings["QUERIES"]), batch * heads)
        query_gradient_kernel[grid](
            *_inputs(q, k_pos, v_pos, mask_pos, k_neg, v_neg, mask_neg),
            factor, up, _strides(up), down, _strides(down), levels, shares, heads, queries, _to_log2(size), size**-0.5,
            MASKED_POS=mask_pos is not None, MASKED_NEG=mask_neg is not None, **settings,
        )  # fmt: skip
        gradients = []
        branches = ((k_pos, v_pos, mask_pos, torch.ones_like(factor)), (k_neg, v_neg, mask_neg, factor))
        for number, (k, v, mask, times) in enumerate(branches):
            k_down, v_down = _rows_first(k), _rows_first(v)
            key_gradient_kernel[(-(-k.shape[2] // settings["KEYS"]), batch * heads)](
                q, _strides(q), k, _strides(k), v, _strides(v), k if mask is None else mask, k.shape[2], times, up, _strides(up),
                levels[number], shares[number], k_down, _strides(k_down), v_down, _strides(v_down),
                heads, queries, _to_log2(size), size**-0.5, MASKED=mask is not None, **settings,
            )  # fmt: skip
            gradients.append((k_down, v_down))
        (k_pos_down, v_pos_down), (k_neg_down, v_neg_down) = gradients
        # Z has -scale * Z-: the sum over an image of <Z-, up>.
        scale_down = -shares[1].sum((1, 2)).to(ctx.scale_type)
        return down, k_pos_down, v_pos_down, None, k_neg_down, v_neg_down, None, scale_down


def _check(
    q: Tensor, k_pos: Tensor, v_pos: Tensor, mask_pos: Tensor | None, k_neg: Tensor, v_neg: Tensor, mask_neg: Tensor | None, scale: Tensor
) -> None:
    batch, heads, _, size = q.shape
    for name, k, v, mask in (("prompt", k_pos, v_pos, mask_pos), ("negative", k_neg, v_neg, mask_neg)):
        if k.shape != v.shape or (k.shape[0], k.shape[1], k.shape[3]) != (batch, heads, size):
            raise ValueError(f"keys {tuple(k.shape)} and values {tuple(v.shape)} of the {name} do not fit queries {tuple(q.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, k.shape[2])):
            raise ValueError(f"the {name}'s mask must be bool {(batch, k.shape[2])}, is {mask.dtype} {tuple(mask.shape)}")
    if scale.shape != (batch,):
        raise ValueError(f"scale must be ({batch},), is {tuple(scale.shape)}")
    if {x.dtype for x in (k_pos, v_pos, k_neg, v_neg)} != {q.dtype} or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError("queries, keys and values must be of one dtype: fp16, bf16 or fp32")
    if size > LARGEST_HEAD:
        raise ValueError(f"a head of {size} is too large, at most {LARGEST_HEAD}")
    if q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("the NASA kernel runs on a GPU; on a CPU only in Triton's interpreter (TRITON_INTERPRET=1)")


def _inputs(q: Tensor, *branches: Any) -> tuple:
    """What every kernel takes first. A mask that is not there is never read: any pointer will do."""
    found: list[Any] = [q, _strides(q)]
    for k, v, mask in (branches[:3], branches[3:]):
        found += [k, _strides(k), v, _strides(v), k if mask is None else mask, k.shape[2]]
    return tuple(found)


def blocks(size: int, dtype: torch.dtype, on_cpu: bool = False, backward: bool = False) -> dict[str, Any]:
    """The settings that a kernel is compiled with for heads of this size and dtype."""
    main = max(SMALLEST, 1 << (size.bit_length() - 1))
    rest = 0 if main >= size else max(SMALLEST, 1 << (size - main - 1).bit_length())
    # So that nothing spills: 226 of a thread's 255 registers for bf16 heads of 72, forward, compiled for sm_90.
    small = backward or size > 96 or dtype == torch.float32
    precision = "ieee" if dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32 else "tf32"
    return {
        "PRECISION": "wide" if on_cpu and dtype == torch.bfloat16 else precision,
        "QUERIES": 64 if small else 128,
        "KEYS": 32 if small else 64,
        "SIZE": size,
        "MAIN": main,
        "REST": rest,
        "num_warps": 8,
    }


def _to_log2(size: int) -> float:
    return size**-0.5 * math.log2(math.e)


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows_first(x: Tensor) -> Tensor:
    """An empty tensor (B, H, N, d) like x that lies in memory as (B, N, H, d)."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
