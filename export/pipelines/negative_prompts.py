"""Negative prompts for diffusers pipelines, in one call of the network: `pipe = with_negative(pipe)`.

The pipeline encodes the negative prompt like its prompt, both states are concatenated, and every attention to the text splits them again.
So everything else in a pipeline still works: offloading, LoRAs, callbacks, batches, torch.compile.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline, ZImageTransformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from snoopi_rt.errors import InputError
from snoopi_rt.export.attention import fused_guidance, keys_values, merge_heads, queries, text_mask
from snoopi_rt.export.guidance import GUIDANCE, Guidance, find_guidance
from snoopi_rt.export.pipelines.joint_attention import GUIDANCE as JOINT_GUIDANCE
from snoopi_rt.export.pipelines.joint_attention import JointGuidance, JointProcessor, joint_attentions
from snoopi_rt.export.pipelines.z_image import CaptionProcessor, pair_captions, unpair_captions
from snoopi_rt.kernels import fused_attention

_OF_THE_PROMPT = ("prompt_2", "prompt_3", "prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")


def with_negative(pipe: DiffusionPipeline, kind: str = "nasa") -> DiffusionPipeline:
    """See snoopi_rt.diffusers."""
    without_negative(pipe)
    network, attentions = _network(pipe), _attentions(pipe)
    if not attentions or not hasattr(pipe, "encode_prompt"):
        raise InputError(f"{type(pipe).__name__} has no text attention that supports negative prompts")
    joint = bool(joint_attentions(network))
    kinds = list(JOINT_GUIDANCE) if joint else [name for name, guidance in GUIDANCE.items() if guidance.formula is not None]
    if kind not in kinds:
        raise InputError(f"unknown kind {kind!r} of {type(pipe).__name__}, choose from {', '.join(kinds)}")
    if any("IPAdapter" in type(attn.processor).__name__ for attn in attentions):
        raise InputError("an IP-Adapter is loaded: unload it, negative prompts do not work together with one")
    if getattr(pipe, "controlnet", None) is not None:
        raise InputError(f"{type(pipe).__name__} has a ControlNet, which would read the negative prompt as part of the prompt")
    if hasattr(pipe, "siglip"):
        raise InputError(f"{type(pipe).__name__} splits its prompts around images: negative prompts are not supported")
    call = _Call(JOINT_GUIDANCE[kind] if joint else find_guidance(kind))
    z_image = isinstance(network, ZImageTransformer2DModel)
    processor = CaptionProcessor if z_image else JointProcessor if joint else _NegativeProcessor
    for attn in attentions:
        attn.set_processor(processor(attn.processor, call, attn))
    if z_image:
        pair_captions(network, call)
    plain = type(pipe)
    # Of the same name: pipelines write it into what they save.
    pipe.__class__ = type(plain.__name__, (_Negative, plain), {"__module__": plain.__module__, "_plain": plain})
    pipe._negative_call = call
    return pipe


def without_negative(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """See snoopi_rt.diffusers."""
    if isinstance(pipe, _Negative):
        for attn in _attentions(pipe):
            if isinstance(attn.processor, _NegativeProcessor | JointProcessor):
                attn.set_processor(attn.processor.plain)
        if isinstance(network := _network(pipe), ZImageTransformer2DModel):
            unpair_captions(network)
        del pipe._negative_call
        pipe.__class__ = pipe._plain
    return pipe


@dataclass
class _Call:
    """What one call of a pipeline tells its cross-attentions."""

    guidance: Guidance | JointGuidance
    negatives: Sequence[str] = ()
    scales: Sequence[float] = ()
    lengths: list[Any] = field(default_factory=list)
    """Tokens of the prompt, the negative, and the empty prompt if it is needed; in Z-Image a list of such for each image; empty without a
    negative."""
    captions: list[Tensor] = field(default_factory=list)
    """In Z-Image the states of each negative, which its network joins to those of the prompt."""
    scale: Tensor | None = None
    """(B,), known once the negatives are encoded."""

    def end(self) -> None:
        self.negatives, self.scales, self.lengths, self.captions, self.scale = (), (), [], [], None


class _Negative(DiffusionPipeline):
    """Precedes a pipeline's own class."""

    _negative_call: _Call
    _plain: type[DiffusionPipeline]

    def __call__(
        self,
        *args: Any,
        negative_prompt: str | Sequence[str | None] | None = None,
        negative_scale: float | Sequence[float] | None = None,
        **options: Any,
    ) -> Any:
        call = self._negative_call
        entries = [negative_prompt] if negative_prompt is None or isinstance(negative_prompt, str) else negative_prompt
        negatives = [text if text and text.strip() else "" for text in entries]
        if negative_scale is not None and not any(negatives):
            raise InputError("negative_scale without a negative_prompt: give both, or neither")
        scale = call.guidance.default_scale if negative_scale is None else negative_scale
        call.scales = [float(scale)] if isinstance(scale, int | float) else [float(value) for value in scale]
        if not all(0 <= value < math.inf for value in call.scales):
            raise InputError(f"negative_scale must be a finite number of at least 0, got {scale}")
        if any(negatives) and any(call.scales):
            if not all(isinstance(attn.processor, _NegativeProcessor | JointProcessor) for attn in _attentions(self)):
                raise InputError("the attention processors were set since with_negative: call it again")
            call.negatives = negatives
        try:
            return super().__call__(*args, **options)
        finally:
            call.end()

    def encode_prompt(self, *args: Any, **options: Any) -> Any:
        """The states of the prompts, followed by those of their negatives (but in Z-Image, whose network joins them)."""
        call = self._negative_call
        encoded = super().encode_prompt(*args, **options)
        if not call.negatives or call.scale is not None:
            return encoded
        signature = inspect.signature(super().encode_prompt)
        arguments = signature.bind(*args, **options).arguments
        if arguments.get("do_classifier_free_guidance", "do_classifier_free_guidance" in signature.parameters):
            raise InputError("guidance_scale runs each step twice: with a negative prompt in the attention, give guidance_scale=0")
        prompts = len(encoded[0]) // arguments.get("num_images_per_prompt", 1)
        negatives, scales = _per_prompt(call.negatives, prompts, "negative_prompt"), _per_prompt(call.scales, prompts, "negative_scale")
        texts = [negatives]
        if call.guidance.measures_from_empty:
            texts.append([""] * prompts)
        # Some pipelines' parameters have no defaults.
        shared = arguments | {name: None for name in _OF_THE_PROMPT if name in signature.parameters}
        # Z-Image's writes into its lists.
        parts = [encoded, *(super(_Negative, self).encode_prompt(**shared | {"prompt": list(text)}) for text in texts)]
        # A blank negative is none.
        scales = [scale if text else 0.0 for text, scale in zip(negatives, scales, strict=True)]
        call.scale = encoded[0][0].new_tensor(scales).repeat_interleave(len(encoded[0]) // prompts)
        if isinstance(encoded[0], list):
            call.captions = parts[1][0]
            return encoded
        call.lengths = [part[0].shape[1] for part in parts]
        joined = list(encoded)
        for index, axis in self._token_axes(len(encoded), "prompt_attention_mask" in signature.parameters).items():
            joined[index] = torch.cat([part[index].to(encoded[index]) for part in parts], axis)
        return tuple(joined)

    def _token_axes(self, count: int, masked: bool) -> dict[int, int]:
        """Which of so many values of `encode_prompt` have tokens, and along which axis: states, a mask, the positions of FLUX's texts."""
        positions = "txt_ids" in inspect.signature(type(_network(self)).forward).parameters
        return {0: 1} | ({1: 1} if masked else {}) | ({count - 1: -2} if positions else {})


class _NegativeProcessor:
    """A cross-attention's own processor, and in a call with negatives the guidance's formula."""

    def __init__(self, plain: Any, call: _Call, attn: Attention):
        self.plain, self._call = plain, call

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        call = self._call
        if not call.lengths or encoder_hidden_states is None:
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, **options)
        k, v = keys_values(attn, encoder_hidden_states)
        (k_pos, k_neg, *k_empty), (v_pos, v_neg, *v_empty) = k.split(call.lengths, 2), v.split(call.lengths, 2)
        mask = text_mask(attention_mask)
        mask_pos, mask_neg, *mask_empty = [None] * len(call.lengths) if mask is None else mask.split(call.lengths, 1)
        if k_empty:  # one row serves all prompts, without its padding
            tokens = slice(None) if mask_empty[0] is None else mask_empty[0][0]
            k_empty, v_empty = ([part[0][:1, :, tokens]] for part in (k_empty, v_empty))
        q = queries(attn, hidden_states)
        guidance: Any = call.guidance
        attend = fused_guidance(guidance.kind, q.device, q.shape[-1]) or partial(guidance.attend, attention=fused_attention)
        z = attend(q, k_pos, v_pos, mask_pos, k_neg, v_neg, mask_neg, call.scale, *k_empty, *v_empty)
        return attn.to_out[0](merge_heads(z)) / attn.rescale_output_factor


def _network(pipe: DiffusionPipeline) -> Any:
    """A pipeline's UNet or transformer, behind torch.compile too; None if it has neither."""
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    return getattr(network, "_orig_mod", network)


def _attentions(pipe: DiffusionPipeline) -> list[Any]:
    """The attentions to the text: the joint ones of a network that has such, else its cross-attentions."""
    network = _network(pipe)
    if not isinstance(network, nn.Module):
        return []
    modules = network.named_modules()
    return joint_attentions(network) or [
        module for name, module in modules if isinstance(module, Attention) and name.rpartition(".")[2] == "attn2"
    ]


def _per_prompt(values: Sequence[Any], count: int, name: str) -> list[Any]:
    """One value per prompt; a single one is for all. Raises InputError for another number."""
    if len(values) not in (1, count):
        raise InputError(f"{name} has {len(values)} entries for {count} prompts")
    return list(values) * (count // len(values))
