"""The architectures that snoopi-rt exports, as data: how a folder of weights becomes modules with a one-step rule and guidance."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from snoopi_rt.bundle.bundle import Text, Vocabulary
from snoopi_rt.errors import InputError
from snoopi_rt.export.guidance import Guidance
from snoopi_rt.export.presets.preset import Preset
from snoopi_rt.export.training.recipes import check_trainable


@dataclass(frozen=True)
class Weights:
    """Where a student's tensors are."""

    folder: Path
    """A diffusers model."""
    network: Path | None = None
    """A file or folder that replaces its transformer or UNet."""
    loras: tuple[tuple[Path, float], ...] = ()
    """LoRA files to merge, with their weights."""
    decoder: Path | None = None
    """The folder of an autoencoder that replaces its vae."""


@dataclass(frozen=True)
class Student:
    """The torch side of a student, fp32 and in evaluation mode."""

    text_encoder: nn.Module
    """ids (B, T) int64 to `text_outputs`, with everything that depends on the prompt alone; on the meta device if `tensor_of` is given."""
    text_outputs: tuple[str, ...]
    """("states",), or ("states", "pooled")."""
    encode: Callable[[list[Tensor]], list[dict[str, Tensor]]]
    """The text encoder's outputs by name, fp32, for the ids (1, T) of each prompt."""
    generator: Callable[[Guidance, Tensor], nn.Module]
    """generator(guidance, empty_states): the network that is exported; it takes the inputs of the graph `generator`."""
    reference: Callable[[Guidance, Tensor], nn.Module]
    """reference(guidance, empty_states): the same as diffusers computes it."""
    decoder: nn.Module
    """latent (B, C, h, w) to image (B, H, W, 3) uint8."""
    write_tokenizer: Callable[[Path], Text]
    """Writes tokenizer.json to the path and returns the rule for prompts."""
    tensor_of: Callable[[str], Tensor] | None = None
    """The text encoder's parameters by name, for one that is larger than the memory; None: they are in the module."""
    vocabulary: Vocabulary | None = None
    """As in Bundle."""
    examples: tuple[str, ...] = ()
    """As in Bundle."""


@dataclass(frozen=True)
class CaptionEncoder:
    """A backbone's text encoder as training uses it: without the layers that belong to the network, which it trains."""

    write_tokenizer: Callable[[Path], Text]
    """Writes tokenizer.json to the path and returns the rule for prompts."""
    encode: Callable[[list[Tensor]], list[Tensor]]
    """States (B, T, D) in fp32 for the ids (B, T) of each entry."""


@dataclass(frozen=True)
class Denoiser:
    """A backbone's network as training sees it."""

    kind: type[nn.Module]
    """Its diffusers class."""
    part: str
    """The folder of its weights in a diffusers model."""
    predict: Callable[..., Tensor]
    """predict(network, x_t, t, states, mask, negative, size): the prediction (B, C, h, w), without a learned variance, for x_t (B, C, h, w)
    at timesteps t (B,). states (B, T, D): a CaptionEncoder's; mask (B, T): bool or None; negative: None, or states (B, U, D), mask (B, U)
    and scale (B,) for a network with GuidedAttention; size: height and width in pixels, on which some networks are conditioned."""
    lora_targets: tuple[str, ...]
    """The layers that a LoRA adapts, by the end of their names."""
    timestep: int
    """The default timestep of a student."""
    masked: bool
    """Whether prompts have different lengths, and so a mask."""
    caption_encoder: Callable[[Path, int], CaptionEncoder]
    """caption_encoder(folder, max_tokens): that of a teacher's folder."""


@dataclass(frozen=True)
class Backbone:
    """One architecture."""

    name: str
    module: str
    """The module of this package with `load(weights, preset, sizes) -> Student` and, if it can be trained, `DENOISER`."""
    parts: tuple[str, ...]
    """The folders of its diffusers model, the network's first."""
    multiple: int
    """What the sides of a latent must be multiples of."""
    precision: dict[str, str]
    """The default precision of each graph."""
    tiny_decoder: str | None = None
    """Hub id of its TAESD."""
    masks: bool = False
    """Whether the graph takes token masks, so that prompts of different lengths can share a batch."""
    opset: int = 23
    """The graphs' ONNX opset; 23 is the first with the operator Attention."""

    def load(self, weights: Weights, preset: Preset, sizes: tuple[tuple[int, int], ...]) -> Student:
        """The modules of a student. Raises InputError for weights that are missing or do not fit."""
        return self._module.load(weights, preset, sizes)

    def denoiser(self) -> Denoiser:
        """What training needs. Raises InputError for a backbone that cannot be trained here."""
        check_trainable(self.name)
        return self._module.DENOISER

    @property
    def _module(self) -> Any:
        return import_module(f"snoopi_rt.export.backbones.{self.module}")


_AUTO = {"text_encoder": "fp16", "generator": "auto", "decoder": "auto"}
_TRANSFORMER = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_CLIP = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

BACKBONES = {
    backbone.name: backbone
    for backbone in (
        Backbone("small", "small", ("transformer", "vae"), 2, dict.fromkeys(_AUTO, "fp16"), masks=True, opset=20),
        Backbone("pixart", "pixart_alpha", _TRANSFORMER, 2, {**_AUTO, "text_encoder": "int8-weights"}, "madebyollin/taesd"),
        Backbone("sd15", "stable_diffusion", _CLIP, 8, _AUTO, "madebyollin/taesd"),
        Backbone("sd21", "stable_diffusion", _CLIP, 8, _AUTO, "madebyollin/taesd"),
        Backbone("sdxl", "stable_diffusion", (*_CLIP, "text_encoder_2", "tokenizer_2"), 8, _AUTO, "madebyollin/taesdxl"),
        Backbone("sana", "sana_sprint", _TRANSFORMER, 1, {**_AUTO, "text_encoder": "int8-weights"}),
    )
}


def find_backbone(name: str) -> Backbone:
    """The backbone of that name. Raises InputError, naming the known ones."""
    if name not in BACKBONES:
        raise InputError(f"unknown backbone {name!r}, choose from {', '.join(BACKBONES)}")
    return BACKBONES[name]
