"""The architectures that snoopi-rt exports, as data: how a folder becomes modules, and how the student is called and read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from snoopi_rt.engines.base import InputError
from snoopi_rt.export.guidance import Guidance
from snoopi_rt.export.one_step import OneStepRule
from snoopi_rt.export.text import minilm


@dataclass(frozen=True)
class Modules:
    """The torch side of a student, fp32 and in evaluation mode.

    text_encoder: ids (B, T) to states (B, T, D), with all that depends on the prompt alone. generator(guidance, empty_states) is the
    network that is exported, reference(guidance, empty_states) the same as diffusers computes it; both take the inputs of the graph
    `generator`. decoder: latent (B, C, h, w) to image (B, H, W, 3) uint8.
    """

    text_encoder: nn.Module
    generator: Callable[[Guidance, Tensor], nn.Module]
    reference: Callable[[Guidance, Tensor], nn.Module]
    decoder: nn.Module
    tokenizer: Path


@dataclass(frozen=True)
class Backbone:
    """One architecture with its one-step rule. `default_scale`: negative scale by kind of guidance, measured for these weights."""

    name: str
    licence: str
    load: Callable[[Path, OneStepRule], Modules]
    rule: OneStepRule
    max_tokens: int
    lowercase: bool
    channels: int
    factor: int
    sizes: tuple[tuple[int, int], ...]
    default_scale: Mapping[str, float]


def _load_small(folder: Path, rule: OneStepRule) -> Modules:
    from snoopi_rt.export.backbones.small import load

    return load(folder, rule)


BACKBONES = {
    backbone.name: backbone
    for backbone in (
        Backbone(
            name="small",
            licence="Apache-2.0; trained on Fluent Emoji (MIT) and Noto Emoji (Apache-2.0), text encoder all-MiniLM-L6-v2 (Apache-2.0)",
            load=_load_small,
            # Zero terminal SNR: at the last timestep the input is pure noise and the clean latent is -v.
            rule=OneStepRule("v", timestep=999, alpha=0.0, sigma=1.0),
            max_tokens=minilm.MAX_TOKENS,
            lowercase=True,
            channels=8,
            factor=8,
            sizes=((128, 128),),
            default_scale={"nasa": 1.0, "projected": 1.0, "none": 0.0},
        ),
    )
}


def find_backbone(name: str) -> Backbone:
    """The backbone of that name. Raises InputError, naming the known ones."""
    if name not in BACKBONES:
        raise InputError(f"unknown backbone {name!r}, choose from {', '.join(BACKBONES)}")
    return BACKBONES[name]
