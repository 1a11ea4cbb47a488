"""Negative prompts in joint attention, where text and image tokens attend to each other: SD3, FLUX, FLUX.2 and Z-Image in diffusers.

The negative's tokens stand behind the prompt's in the text stream. Prompt and negative each attend to themselves and to the image, never to
each other, and image tokens combine what they get from both. All else of a block works token by token, so the negative's stream goes on
beside the prompt's through every layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel, ZImageTransformer2DModel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from snoopi_rt.errors import InputError
from snoopi_rt.kernels import fused_attention, nag_attention, nasa_attention

Stream = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values of some tokens, (B, H, T, d) each."""


def nasa(prompt: Stream, negative: Stream, image: Stream, scale: Tensor) -> Tensor:
    """Z+ - scale * Z-, of whole attentions: over prompt and image, and over negative and image. It takes away image from image, too."""
    return _of_both(nasa_attention, prompt, negative, image, scale)


def nag(prompt: Stream, negative: Stream, image: Stream, scale: Tensor) -> Tensor:
    """NAG as its authors have it in FLUX: tau 2.5, alpha 0.25 (NAG, table 5)."""
    return _of_both(partial(nag_attention, tau=2.5, alpha=0.25), prompt, negative, image, scale)


def vsf(prompt: Stream, negative: Stream, image: Stream, scale: Tensor, offset: float = 0.1) -> Tensor:
    """One softmax over prompt, image and negative, the negative's values times -scale and its logits less `offset` (VSF, ICLR 2026)."""
    q, k, v = _joined(image, prompt, image, negative)
    values = torch.cat([v[:, :, : -negative[2].shape[2]], -scale[:, None, None, None] * negative[2]], 2)
    bias = q.new_zeros(k.shape[2])
    bias[-negative[1].shape[2] :] = -offset
    return scaled_dot_product_attention(q, k, values, attn_mask=bias.expand(1, 1, q.shape[2], -1))


def gated(prompt: Stream, negative: Stream, image: Stream, scale: Tensor) -> Tensor:
    """Z+ - scale * (the negative's text part of Z-).

    In the softmax over negative and image only the negative's values count: a token loses as much as it listens to the negative, and
    what image tokens tell each other stays. Equals `nasa` if all attention is on text.
    """
    q, k, v = _joined(image, negative, image)
    text = torch.cat([v[:, :, : negative[2].shape[2]], torch.zeros_like(image[2])], 2)
    return fused_attention(*_joined(image, prompt, image)) - scale[:, None, None, None] * fused_attention(q, k, text)


@dataclass(frozen=True)
class JointGuidance:
    """How a negative acts on image tokens: combine(prompt, negative, image, scale (B,)) gives their attention, (B, H, N, d)."""

    kind: str
    combine: Callable[[Stream, Stream, Stream, Tensor], Tensor]
    default_scale: float
    measures_from_empty: bool = False


# Scales: VSF's and NAG's papers; of nasa what VSF's authors used; of gated none is published.
GUIDANCE = {
    guidance.kind: guidance
    for guidance in (
        JointGuidance("nasa", nasa, 0.25),
        JointGuidance("nag", nag, 4.0),
        JointGuidance("vsf", vsf, 3.5),
        JointGuidance("gated", gated, 1.0),
    )
}


def joint_attentions(network: nn.Module) -> list[Any]:
    """The attentions of a network in which text and image attend to each other, in order; none if it has another kind."""
    if isinstance(network, ZImageTransformer2DModel):  # the first blocks refine the text alone
        return [block.attention for block in (*network.context_refiner, *network.layers)]
    if not isinstance(network, SD3Transformer2DModel | FluxTransformer2DModel | Flux2Transformer2DModel):
        return []  # others have text and image in another order, or masks
    attentions = [module for module in network.modules() if hasattr(module, "set_processor") and hasattr(module, "processor")]
    double = [attn for attn in attentions if getattr(attn, "add_k_proj", None) is not None]
    # In FLUX's single blocks one stream holds both; SD3 has attentions of the image alone beside.
    return [attn for attn in attentions if attn in double or _text_first(attn)]


class JointProcessor:
    """A joint attention's own processor, in whose attention the negative's tokens are kept apart in a call that has a negative.

    call: with `lengths` of prompt and negative, empty without a negative; `guidance` and `scale` (B,).
    """

    def __init__(self, plain: Any, call: Any, attn: Any):
        self.plain, self._call, self._text_first = plain, call, _text_first(attn)

    def __call__(self, attn: Any, *arguments: Any, **options: Any) -> Any:
        if not self._call.lengths:
            return self.plain(attn, *arguments, **options)
        return self._guided(attn, *arguments, **options)

    @property
    def _attention_backend(self) -> Any:
        """Where a network's `set_attention_backend` sets it."""
        return self.plain._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.plain._attention_backend = backend

    # torch.compile would both trace the mode and leave it on for what it traced; so it compiles what stands around attentions.
    @torch.compiler.disable
    def _guided(self, attn: Any, *arguments: Any, **options: Any) -> Any:
        with _Instead(self._attend) as instead:
            result = self.plain(attn, *arguments, **options)
        if not instead.done:
            raise InputError("a negative prompt needs torch's own attention here: pipe.transformer.set_attention_backend('native')")
        return result

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: object) -> Tensor:
        if attn_mask is not None:
            raise InputError("a negative prompt in a joint attention with a mask is not supported")
        return self._apart(query, key, value, self._call.lengths, self._call.scale)

    def _apart(self, query: Tensor, key: Tensor, value: Tensor, texts: list[int], scale: Tensor) -> Tensor:
        """Attention over text and image that keeps prompt and negative, of so many tokens each, apart."""
        pixels = query.shape[2] - sum(texts)
        sizes = [*texts, pixels] if self._text_first else [pixels, *texts]
        streams = list(zip(*(x.split(sizes, 2) for x in (query, key, value)), strict=True))
        prompt, negative, image = streams if self._text_first else (*streams[1:], streams[0])
        out_texts = [fused_attention(*_joined(text, text, image)) for text in (prompt, negative)]
        out_image = self._call.guidance.combine(prompt, negative, image, scale) if pixels else image[0]
        return torch.cat([*out_texts, out_image] if self._text_first else [out_image, *out_texts], 2)


class _Instead(TorchFunctionMode):
    """Inside it `attend` takes the place of torch's attention, once. All else that a processor does stays."""

    def __init__(self, attend: Callable[..., Tensor]):
        super().__init__()
        self._attend, self.done = attend, False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if self.done or func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.done = True  # what follows are the parts of this one
        return self._attend(*args, **(kwargs or {}))


def _text_first(attn: Any) -> bool:
    """Whether text stands before the image, as in all of FLUX; in SD3 and Z-Image it stands behind."""
    return type(attn).__name__.startswith("Flux")


def _joined(asking: Stream, *attended: Stream) -> Stream:
    """The queries of some tokens, and the keys and values of those that they attend to."""
    return asking[0], torch.cat([stream[1] for stream in attended], 2), torch.cat([stream[2] for stream in attended], 2)


def _of_both(formula: Callable[..., Tensor], prompt: Stream, negative: Stream, image: Stream, scale: Tensor) -> Tensor:
    q, k_pos, v_pos = _joined(image, prompt, image)
    _, k_neg, v_neg = _joined(image, negative, image)
    return formula(q, k_pos, v_pos, None, k_neg, v_neg, None, scale, attention=fused_attention)
