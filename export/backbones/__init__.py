"""The architectures that snoopi-rt exports, as data: how folders of weights become modules with one-step rule and guidance."""

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


@dataclass(frozen=True)
class Weights:
    """Where a student's tensors are. `folder`: a diffusers model. `network`: a file or folder that stands in for its transformer or UNet.

    `loras`: files merged into the network, with their weights. `decoder`: the folder of another vae.
    """

    folder: Path
    network: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    decoder: Path | None = None


@dataclass(frozen=True)
class Student:
    """The torch side of a student, fp32 and in evaluation mode.

    text_encoder: ids (B, T) to what `text_outputs` names, with all that depends on the prompt alone; on the meta device where `tensor_of`
    gives its parameters by name, which is how an encoder larger than the memory is written. encode: the same for one prompt's ids, as
    fp32 tensors. generator(guidance, empty_states) is the network that is exported, reference(guidance, empty_states) the same as diffusers
    computes it; both take the inputs of the graph `generator`. decoder: latent (B, C, h, w) to image (B, H, W, 3) uint8.
    write_tokenizer(path) writes tokenizer.json and gives the rule of its prompts. vocabulary, examples: as in Bundle.
    """

    text_encoder: nn.Module
    text_outputs: tuple[str, ...]
    encode: Callable[[list[Tensor]], list[dict[str, Tensor]]]
    generator: Callable[[Guidance, Tensor], nn.Module]
    reference: Callable[[Guidance, Tensor], nn.Module]
    decoder: nn.Module
    write_tokenizer: Callable[[Path], Text]
    tensor_of: Callable[[str], Tensor] | None = None
    vocabulary: Vocabulary | None = None
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptEncoder:
    """A backbone's text encoder as training uses it: before all that the network itself learns.

    write_tokenizer(path) writes tokenizer.json and gives the rule of its prompts. encode: ids (B, T) to states (B, T, D), fp32, each.
    """

    write_tokenizer: Callable[[Path], Text]
    encode: Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Denoiser:
    """A backbone's network as training sees it. `kind`: its diffusers class, whose weights lie in the folder `part`.

    answer(network, x_t, t, states, mask, negative, size): what it says of x_t (B, C, h, w) at t (B,), (B, C, h, w), its variance left out.
    states (B, T, D) are a PromptEncoder's, mask (B, T) bool or None; negative: states (B, U, D), mask and scale (B,), for a network with
    GuidedAttention, or None; size: the image's height and width, on which some networks are conditioned. lora_targets: the layers that a
    LoRA adapts. timestep: what a student is fed where nothing is said.
    prompt_encoder(folder, max_tokens): that of a teacher's folder.
    """

    kind: type[nn.Module]
    part: str
    answer: Callable[..., Tensor]
    lora_targets: tuple[str, ...]
    timestep: int
    masked: bool
    prompt_encoder: Callable[[Path, int], PromptEncoder]


@dataclass(frozen=True)
class Backbone:
    """One architecture. `module` has `load(weights, preset, sizes) -> Student` and, where it can be trained, `DENOISER`.

    multiple: what the sides of a latent are multiples of. masks: the graph takes token masks, so that prompts of different lengths share a
    batch. precision: what each graph is exported in where nothing is said. tiny_decoder: hub id of its TAESD. opset: see graph.py.
    """

    name: str
    module: str
    parts: tuple[str, ...]
    multiple: int
    precision: dict[str, str]
    tiny_decoder: str | None = None
    masks: bool = False
    opset: int = 23

    def load(self, weights: Weights, preset: Preset, sizes: tuple[tuple[int, int], ...]) -> Student:
        """The modules of a student. Raises InputError for weights that are missing or do not fit."""
        return self._module.load(weights, preset, sizes)

    def denoiser(self) -> Denoiser:
        """What training needs. Raises InputError for a backbone that cannot be trained here."""
        if self.name not in TRAINED:
            raise InputError(f"backbone {self.name} cannot be trained here, choose from {', '.join(TRAINED)}")
        return self._module.DENOISER

    @property
    def _module(self) -> Any:
        return import_module(f"snoopi_rt.export.backbones.{self.module}")


TRAINED = ("small", "pixart", "sd15", "sd21")
_AUTO = {"text_encoder": "fp16", "generator": "auto", "decoder": "auto"}
_CLIP = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

BACKBONES = {
    backbone.name: backbone
    for backbone in (
        Backbone("small", "small", ("transformer", "vae"), 2, dict.fromkeys(_AUTO, "fp16"), masks=True, opset=20),
        Backbone(
            "pixart",
            "pixart_alpha",
            ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"),
            2,
            {**_AUTO, "text_encoder": "int8-weights"},
            "madebyollin/taesd",
        ),
        Backbone("sd15", "stable_diffusion", _CLIP, 8, _AUTO, "madebyollin/taesd"),
        Backbone("sd21", "stable_diffusion", _CLIP, 8, _AUTO, "madebyollin/taesd"),
        Backbone("sdxl", "stable_diffusion", (*_CLIP, "text_encoder_2", "tokenizer_2"), 8, _AUTO, "madebyollin/taesdxl"),
    )
}


def find_backbone(name: str) -> Backbone:
    """The backbone of that name. Raises InputError, naming the known ones."""
    if name not in BACKBONES:
        raise InputError(f"unknown backbone {name!r}, choose from {', '.join(BACKBONES)}")
    return BACKBONES[name]
