"""Negative prompts beside the prompts of Z-Image, whose captions have lengths of their own and become one sequence with the image.

The network pads each caption to a multiple of 32 with a token that it has learned, numbers its tokens from 1 for RoPE, and puts the image
behind the last. All that follows from `patchify_and_embed`, so this is where a negative joins its prompt; the attentions then keep the two
apart (joint_attention.py).
"""

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from snoopi_rt.errors import InputError
from snoopi_rt.export.pipelines.joint_attention import JointProcessor


class CaptionPairs:
    """A network's own patchify_and_embed, in whose answer each caption is followed by its negative in a call that has negatives.

    call: with `negatives`, the `captions` that they were encoded to, one per prompt, and `scale`. It gets the `lengths` of each image's.
    """

    def __init__(self, plain: Callable[..., Any], call: Any):
        self.plain, self._call = plain, call

    def __call__(self, images: list[Tensor], captions: list[Tensor], *sizes: int) -> Any:
        return self._paired(images, captions, *sizes) if self._call.negatives else self.plain(images, captions, *sizes)

    @torch.compiler.disable  # as the attentions that separate them
    def _paired(self, images: list[Tensor], captions: list[Tensor], *sizes: int) -> Any:
        call = self._call
        if not call.captions:
            raise InputError("a negative prompt needs the prompt as text: with prompt_embeds alone, the pipeline encodes nothing")
        images_per_prompt = len(captions) // len(call.captions)
        negatives = [caption for caption in call.captions for _ in range(images_per_prompt)]
        call.scale = call.scale.repeat_interleave(len(captions) // len(call.scale))  # once: the pipeline repeats after encoding
        tokens, texts, shapes, places, text_places, padding, text_padding = self.plain(images, captions, *sizes)
        _, others, _, _, other_places, _, other_padding = self.plain(images, negatives, *sizes)
        call.lengths = [[len(text), len(other)] for text, other in zip(texts, others, strict=True)]
        for row, (prompt, negative) in enumerate(call.lengths):
            # The image stands behind both alike, as each of them would have it: RoPE sees only how far apart two tokens are.
            behind, ahead = max(prompt - negative, 0), max(negative - prompt, 0)
            places[row] = _moved(places[row], ahead)
            # Behind those of its tokens diffusers 0.42 has the places of the padding once more.
            pair = _moved(text_places[row][:prompt], ahead), _moved(other_places[row][:negative], behind)
            text_places[row] = torch.cat(pair)
            texts[row] = torch.cat([texts[row], others[row]])
            text_padding[row] = torch.cat([text_padding[row], other_padding[row]])
        return tokens, texts, shapes, places, text_places, padding, text_padding


class CaptionProcessor(JointProcessor):
    """A JointProcessor for texts of many lengths, [prompt, negative] of each image in `call.lengths`."""

    # diffusers' Attention reads these names, and passes on nothing else.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Any:
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: object) -> Tensor:
        # The mask only hides what pads the shorter rows of a batch: here it is left out. Neighbours of the same lengths go together.
        lengths, result = self._call.lengths, torch.zeros_like(query)
        pixels = query.shape[2] - max(map(sum, lengths))
        for texts, group in groupby(range(len(lengths)), lengths.__getitem__):
            neighbours = list(group)
            rows, tokens = slice(neighbours[0], neighbours[-1] + 1), slice(pixels + sum(texts))
            q, k, v = (x[rows, :, tokens] for x in (query, key, value))
            result[rows, :, tokens] = self._apart(q, k, v, texts, self._call.scale[rows])
        return result


def pair_captions(network: nn.Module, call: Any) -> None:
    """Lets negatives join the captions of a ZImageTransformer2DModel."""
    network.patchify_and_embed = CaptionPairs(network.patchify_and_embed, call)


def unpair_captions(network: nn.Module) -> None:
    """Undoes the last `pair_captions`."""
    pairs = vars(network).pop("patchify_and_embed", None)
    if pairs is not None and isinstance(pairs.plain, CaptionPairs):  # of another pipeline with the same network
        network.patchify_and_embed = pairs.plain


def _moved(places: Tensor, by: int) -> Tensor:
    """Places (T, 3) moved along the first axis, on which captions have theirs."""
    return places + places.new_tensor([by, 0, 0])
