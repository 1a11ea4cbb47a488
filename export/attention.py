"""diffusers attention processors: one for training, one that puts a negative prompt into every cross-attention."""

from diffusers.models.attention_processor import Attention
from torch import Tensor

from snoopi_rt.export.guidance import Guidance
from snoopi_rt.kernels import attention


class PlainAttention:
    """Self- and cross-attention written out; stands in for diffusers' default wherever gradients run on a CPU."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (split_heads(x, attn.heads) for x in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)))
        return attn.to_out[0](merge_heads(attention(q, k, v, text_mask(attention_mask))))


class GuidedAttention:
    """PlainAttention that also takes a negative prompt, handed over as `cross_attention_kwargs={"negative": (states, mask, scale)}`.

    `empty_states` (1, T0, D) is what a guidance that measures from the empty prompt needs.
    """

    def __init__(self, guidance: Guidance, empty_states: Tensor):
        self.guidance, self.empty_states = guidance, empty_states

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        negative: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is None or negative is None or self.guidance.attend is None:
            return PlainAttention()(attn, hidden_states, encoder_hidden_states, attention_mask)

        def keys_values(states: Tensor) -> tuple[Tensor, Tensor]:
            return split_heads(attn.to_k(states), attn.heads), split_heads(attn.to_v(states), attn.heads)

        states, mask, scale = negative
        k_pos, v_pos = keys_values(encoder_hidden_states)
        k_neg, v_neg = keys_values(states)
        empty = keys_values(self.empty_states) if self.guidance.measures_from_empty else ()
        q = split_heads(attn.to_q(hidden_states), attn.heads)
        z = self.guidance.attend(q, k_pos, v_pos, text_mask(attention_mask), k_neg, v_neg, mask, scale, *empty)
        return attn.to_out[0](merge_heads(z))


def text_mask(bias: Tensor | None) -> Tensor | None:
    """The mask (B, T) bool behind the additive bias (B, 1, T), 0 or -10000, that PixArt makes of it."""
    return None if bias is None else bias[:, 0] > -1


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, H * d) to (B, H, T, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, d) to (B, T, H * d)."""
    return x.transpose(1, 2).flatten(2)
