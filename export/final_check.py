"""The last thing before an export is done: pictures through the finished bundle, of prompts at the limits of what it takes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.errors import OutputError
from snoopi_rt.export.onnx_graphs.parity import relative_l2
from snoopi_rt.pipeline import open_pipeline
from snoopi_rt.prompt_encoder import Conditioning
from snoopi_rt.tokenizer import Tokenizer

ANOTHER = 0.5
"""Relative L2 from PyTorch's states: 4-bit weights give 0.2 at most, a wrong row or position gives 1 and more."""


@dataclass(frozen=True)
class Extreme:
    """A prompt at a limit: what it is, its ids (1, T), and PyTorch's states of it."""

    name: str
    ids: Tensor
    states: Mapping[str, Tensor]


def extreme_ids(tokenizer: Tokenizer, highest: int) -> dict[str, Tensor]:
    """The ids (1, T) of the longest prompt that there can be, and those of one with the highest token id."""
    longest, short = (torch.from_numpy(tokenizer(text, truncate=True)) for text in ("a " * tokenizer.max_tokens, "a cat"))
    short[0, min(1, short.shape[1] - 1)] = highest
    return {"the longest prompt": longest, "the highest token id": short}


def draw_whole(bundle: Bundle, engines: Sequence[str], extremes: Sequence[Extreme], say: Callable[[str], None]) -> None:
    """Draws each size that the bundle promises on each of the engines that it is for, from the extremes, or else from a carried prompt.

    Raises OutputError for states unlike PyTorch's, NaN and a flat picture, BundleError where a graph gives another shape than is promised.
    """
    for engine in (engine for engine in engines if engine in bundle.engines()):
        with open_pipeline(bundle, engine, None, None, Cache(), low_memory=True) as pipe:
            prompts = [_conditioning(bundle, engine, extreme, pipe._prompts.encode_ids(extreme.ids.numpy())) for extreme in extremes]
            if not prompts:
                assert bundle.prompts is not None
                prompts = [pipe.prepare(text) for text in (bundle.prompts.texts[0], bundle.prompts.texts[-1])]
            for size, prompt, negative in _pictures(bundle, prompts):
                pipe.generate(prompt, None if bundle.guidance.kind == "none" else negative, seed=0, size=size)
        say(f"drawn whole on {engine}: {', '.join(prompts)}")


def _pictures(bundle: Bundle, prompts: Sequence[Conditioning]) -> Iterator[tuple[tuple[int, int], Conditioning, Conditioning]]:
    """Size, prompt and negative: one prompt at every size, and at the first both ways round."""
    one, other = prompts
    yield bundle.sizes[0], other, one
    for size in bundle.sizes:
        yield size, one, other


def _conditioning(bundle: Bundle, engine: str, extreme: Extreme, states: Mapping[str, np.ndarray]) -> Conditioning:
    for name, want in extreme.states.items():
        have = states[name]
        if have.shape != tuple(want.shape):
            raise OutputError(f"text_encoder gives {name} of shape {have.shape} on engine {engine!r}, PyTorch {tuple(want.shape)}")
        if (error := relative_l2(have, want.numpy())) > ANOTHER:
            raise OutputError(
                f"text_encoder gives other {name} than PyTorch on engine {engine!r} for {extreme.name} (relative L2 {error:.2g}): "
                "the bundle would draw something else"
            )
    return Conditioning(extreme.name, dict(states), bundle.hash)
