"""Attention with a negative prompt: what every faster form must equal."""

from snoopi_rt.kernels.reference import attention, nasa_attention, projected_attention

__all__ = ["attention", "nasa_attention", "projected_attention"]
