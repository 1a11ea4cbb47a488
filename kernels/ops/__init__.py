"""Attention with a negative prompt: the reference that every faster implementation must equal."""

from snoopi_rt.kernels.reference import (
    attention,
    fused_attention,
    nag_attention,
    nasa_attention,
    projected_attention,
    transposed_attention,
    vsf_attention,
)

__all__ = [
    "attention",
    "fused_attention",
    "nag_attention",
    "nasa_attention",
    "projected_attention",
    "transposed_attention",
    "vsf_attention",
]
