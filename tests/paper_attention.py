"""The kinds of guidance as diffusers attention processors, written from the papers' formulas and diffusers' own pieces alone."""

from typing import Any

import torch
from torch import Tensor

KINDS = ("nasa", "nag", "vsf", "projected")
SCALES = (0.0, 0.2, 0.5, 1.0)
CONSTANTS = {"tau": 2.5, "alpha": 0.5}


class PaperAttention:
    """A processor for self- and cross-attention; the latter sees a negative prompt too.

    negative (B, U, D), scale (B,), empty (1, T0, D): the states of the negative prompts and of the empty one. keep (B, U)
    bool: which of the negative's tokens count. kind "none" is diffusers' AttnProcessor. across_heads: queries and keys are normalised
    before they are split into heads.
    """

    def __init__(self, kind: str, negative: Tensor, scale: Tensor, empty: Tensor, keep: Tensor | None = None, across_heads: bool = False):
        self.across_heads = across_heads
        self.kind, self.negative, self.scale, self.empty = kind, negative, scale[:, None, None], empty
        self.keep = torch.ones(negative.shape[:2], dtype=torch.bool) if keep is None else keep

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        def heads(x: Tensor, norm: Any = None) -> Tensor:
            if norm is None:
                return attn.head_to_batch_dim(x)
            return attn.head_to_batch_dim(norm(x)) if self.across_heads else norm(attn.head_to_batch_dim(x))

        query = heads(attn.to_q(hidden_states), attn.norm_q)

        def keys_values(states: Tensor) -> tuple[Tensor, Tensor]:
            states = states.expand(len(hidden_states), -1, -1)
            return heads(attn.to_k(states), attn.norm_k), heads(attn.to_v(states))

        def attend(key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            if mask is not None:
                mask = attn.prepare_attention_mask(mask, mask.shape[-1], len(hidden_states))
            return attn.batch_to_head_dim(attn.get_attention_scores(query, key, mask) @ value)

        cross = encoder_hidden_states is not None
        key, value = keys_values(encoder_hidden_states if cross else hidden_states)
        z = attend(key, value, attention_mask)
        if cross and self.kind != "none":
            other_key, other_value = keys_values(self.negative)
            other_mask = (1 - self.keep.float())[:, None] * -10000.0
            other = attend(other_key, other_value, other_mask)
            match self.kind:
                case "nasa":
                    z = z - self.scale * other
                case "nag":
                    tilted = z + self.scale * (z - other)
                    ratio = tilted.norm(p=1, dim=-1, keepdim=True) / z.norm(p=1, dim=-1, keepdim=True)
                    capped = tilted * ratio.clamp(max=CONSTANTS["tau"]) / ratio
                    z = CONSTANTS["alpha"] * capped + (1 - CONSTANTS["alpha"]) * z
                case "vsf":
                    signed = -self.scale.repeat_interleave(attn.heads, 0) * other_value
                    ours = torch.zeros_like(other_mask[:, :, :1]).expand(-1, -1, key.shape[1]) if attention_mask is None else attention_mask
                    both = attend(torch.cat([key, other_key], 1), torch.cat([value, signed], 1), torch.cat([ours, other_mask], -1))
                    z = torch.where(self.scale == 0, z, both)
                case "projected":
                    null = attend(*keys_values(self.empty), None)
                    along = other - null
                    share = ((z - null) * along).sum(-1, keepdim=True).clamp(min=0) / ((along**2).sum(-1, keepdim=True) + 1e-6)
                    z = z - self.scale * share * along
        return attn.to_out[0](z)
