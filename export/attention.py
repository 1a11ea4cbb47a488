"""Attention with a negative prompt: processors for diffusers' own networks, and the modules that replace its attention for export."""

from collections.abc import Callable
from functools import partial

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from snoopi_rt.export.guidance import Guidance
from snoopi_rt.kernels import attention, fused_attention, transposed_attention

Negative = tuple[int, Tensor | None, Tensor]
"""What an attention to both prompts needs: the prompt's length T, the negative's mask (B, U) bool or None, and its scale (B,)."""
NegativePrompt = tuple[Tensor, Tensor | None, Tensor] | tuple[Tensor, Tensor | None, Tensor, Tensor]
"""States (B, U, D), mask (B, U) bool or None, scale (B,); and the empty prompt (1, T0, D) while the layer that projects it is trained."""


class PlainAttention:
    """Self- and cross-attention that ignores a negative prompt; written out by default, which has the fastest gradients on a CPU."""

    def __init__(self, attention: Callable[..., Tensor] = attention):
        self.attention = attention

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        negative: NegativePrompt | None = None,
        **_: object,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = queries(attn, hidden_states), *keys_values(attn, source)
        return attn.to_out[0](merge_heads(self.attention(q, k, v, text_mask(attention_mask))))


class GuidedAttention(PlainAttention):
    """PlainAttention with a negative prompt, passed as `cross_attention_kwargs={"negative": (states, mask, scale)}`.

    `empty_states` (1, T0, D): the empty prompt, for a guidance that measures from it; one that comes with the negative prompt takes its
    place. It follows the formulas; exported networks have OneProductAttention, which is tested against it. `attend` replaces the guidance's
    formula, see `fused_guidance`.
    """

    def __init__(
        self,
        guidance: Guidance,
        empty_states: Tensor,
        attention: Callable[..., Tensor] = attention,
        attend: Callable[..., Tensor] | None = None,
    ):
        super().__init__(attention)
        self.guidance, self.empty_states = guidance, empty_states
        self.attend = attend or (guidance.attend and partial(guidance.attend, attention=attention))

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        negative: NegativePrompt | None = None,
        **_: object,
    ) -> Tensor:
        if encoder_hidden_states is None or negative is None or self.attend is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        states, mask, scale, *learned = negative
        k_pos, v_pos = keys_values(attn, encoder_hidden_states)
        k_neg, v_neg = keys_values(attn, states)
        empty = keys_values(attn, learned[0] if learned else self.empty_states) if self.guidance.measures_from_empty else ()
        q = queries(attn, hidden_states)
        z = self.attend(q, k_pos, v_pos, text_mask(attention_mask), k_neg, v_neg, mask, scale, *empty)
        return attn.to_out[0](merge_heads(z))


def fused_guidance(kind: str, device: torch.device, head_dim: int) -> Callable[..., Tensor] | None:
    """What computes a guidance faster than its formula: our kernel for nasa on a GPU, if triton is installed and takes such heads; else
    None."""
    if device.type != "cuda" or kind != "nasa":
        return None
    try:
        from snoopi_rt.kernels.nasa import MAX_HEAD_DIM, fused_nasa_attention
    except ImportError:
        return None
    return fused_nasa_attention if head_dim <= MAX_HEAD_DIM else None


class SelfAttention(nn.Module):
    """A self-attention for export, in place of a diffusers `Attention`; arguments that concern text are ignored."""

    def __init__(self, attn: Attention):
        super().__init__()
        self.attn = attn

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        q, (k, v) = queries(self.attn, hidden_states), keys_values(self.attn, hidden_states)
        return self.attn.to_out[0](merge_heads(fused_attention(q, k, v)))


class OneProductAttention(nn.Module):
    """A cross-attention for export, in place of a diffusers `Attention`: one key and one value product over both prompts, and those of the
    empty prompt as constants.

    `encoder_hidden_states` (B, T + U, D): the states of the prompt, then of the negative, see `both_prompts`. `attention_mask` (B, T) bool,
    of the prompt, or None: all tokens count. `attention`: see kernels/ops/reference.py.
    """

    def __init__(self, attn: Attention, guidance: Guidance, empty_states: Tensor, attention: Callable[..., Tensor] = transposed_attention):
        super().__init__()
        self.attn, self.guidance, self.attention = attn, guidance, attention
        if guidance.measures_from_empty:
            with torch.no_grad():
                self.key_empty, self.value_empty = (nn.Buffer(x) for x in keys_values(attn, empty_states))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        negative: Negative | None = None,
    ) -> Tensor:
        q, (k, v) = queries(self.attn, hidden_states), keys_values(self.attn, encoder_hidden_states)
        if self.guidance.attend is None or negative is None:
            return self.attn.to_out[0](merge_heads(self.attention(q, k, v, attention_mask)))
        t, negative_mask, scale = negative
        empty = (self.key_empty, self.value_empty) if self.guidance.measures_from_empty else ()
        prompt, other = (k[:, :, :t], v[:, :, :t], attention_mask), (k[:, :, t:], v[:, :, t:], negative_mask)
        z = self.guidance.attend(q, *prompt, *other, scale, *empty, attention=self.attention)
        return self.attn.to_out[0](merge_heads(z))


def both_prompts(
    prompt_states: Tensor, negative_states: Tensor | None, negative_scale: Tensor | None, negative_mask: Tensor | None = None
) -> tuple[Tensor, Negative | None]:
    """The states of prompt and negative in one, (B, T + U, D), so that one key and one value product serve both; and what takes them apart,
    None without a negative."""
    if negative_states is None:
        return prompt_states, None
    assert negative_scale is not None, "a negative has a scale"
    return torch.cat([prompt_states, negative_states], 1), (prompt_states.shape[1], negative_mask, negative_scale)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention (B, H, N, d) with weights relu(q) relu(k) in place of a softmax (SANA, arXiv 2410.10629): keys meet values first.

    Means over the tokens and not sums, and a bound for the divisor where diffusers adds 1e-15: the same quotient, none of it beyond fp16's
    range; and an exporter takes 1e-15 for nothing.
    """
    q, k = q.relu(), k.relu() / k.shape[2]
    return (q @ (k.transpose(-1, -2) @ v)) / (q @ k.sum(2).unsqueeze(-1)).clamp(min=1e-7)


def queries(attn: Attention, hidden: Tensor) -> Tensor:
    """The queries (B, H, N, d), normalised if the network does so."""
    return _normalised(attn.to_q(hidden), attn.norm_q, attn.heads)


def keys_values(attn: Attention, states: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, (B, H, T, d) both. Keys are normalised if the network does so, those of a negative too."""
    return _normalised(attn.to_k(states), attn.norm_k, attn.heads), split_heads(attn.to_v(states), attn.heads)


def _normalised(x: Tensor, norm: nn.Module | None, heads: int) -> Tensor:
    """(B, T, H * d) to (B, H, T, d), by a norm of each head or, as in Sana, of all heads together."""
    if norm is None:
        return split_heads(x, heads)
    size = getattr(norm, "normalized_shape", None) or norm.dim  # torch's and diffusers' norms name it differently
    return split_heads(norm(x), heads) if size[-1] == x.shape[-1] else norm(split_heads(x, heads))


def text_mask(bias: Tensor | None) -> Tensor | None:
    """The mask (B, T) bool behind the additive bias (B, 1, T), 0 or -10000, that PixArt makes of it."""
    return None if bias is None else bias[:, 0] > -1


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, H * d) to (B, H, T, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, d) to (B, T, H * d)."""
    return x.transpose(1, 2).flatten(2)
