"""Who draws the images that are judged: a bundle, the student in torch, or a teacher in many steps, all from the same noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor
from tqdm import tqdm

import snoopi_rt
from snoopi_rt.bundle.bundle import MANIFEST
from snoopi_rt.engines.messages import why
from snoopi_rt.engines.threads import available_threads
from snoopi_rt.errors import InputError
from snoopi_rt.export.attention import GuidedAttention, PlainAttention
from snoopi_rt.export.backbones import Weights
from snoopi_rt.export.backbones.network import load_decoder
from snoopi_rt.export.backbones.pixart import pixart_prediction
from snoopi_rt.export.decoder import Decoder
from snoopi_rt.export.device import default_device
from snoopi_rt.export.evaluation.threads import in_threads
from snoopi_rt.export.presets.choose import default_preset
from snoopi_rt.export.small_model import teacher
from snoopi_rt.export.text.minilm import encode
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.files import fingerprint
from snoopi_rt.files import check_folder
from snoopi_rt.runtime.inputs import draw_noise

BATCH = 16  # images of a student
WORKERS = 8  # at most: each needs memory of its own
TEACHER_BATCH = 64
PRESET = default_preset("small")

NegativeTexts = str | Sequence[str | None] | None


class DrawImages(Protocol):
    """Images (N, H, W, 3) uint8 of prompts with their seeds; one negative for all, or one for each; scale: None is the default."""

    def __call__(
        self, prompts: Sequence[str], seeds: Sequence[int], negative: NegativeTexts = None, scale: float | None = None
    ) -> np.ndarray: ...


@dataclass(frozen=True)
class Sampler:
    """Something that draws, called as DrawImages. cell: the pixels of a side of its latents' cells. facts: what it is, for the report.

    bundle: the bundle, if it is one.
    """

    draw: DrawImages
    kind: Literal["student", "teacher", "peer"]
    cell: int
    facts: dict[str, Any] = field(default_factory=dict)
    bundle: snoopi_rt.Bundle | None = None

    def __call__(
        self, prompts: Sequence[str], seeds: Sequence[int], negative: NegativeTexts = None, scale: float | None = None
    ) -> np.ndarray:
        return self.draw(prompts, seeds, negative, scale)


def open_student(folder: Path | None) -> Sampler:
    """That of a bundle, None is the embedded one, or of a student's folder in diffusers layout. Raises InputError for another folder."""
    if folder is None or (folder / MANIFEST).exists():
        return _bundle(folder)
    if (check_folder(folder) / "transformer").is_dir():
        return _torch_student(folder)
    raise InputError(f"{folder} is neither a bundle (no {MANIFEST}) nor a student (no transformer/)")


def open_teacher(folder: Path, decoder: Path | None = None) -> Sampler:
    """That of a teacher's folder, by DDIM at its usual steps and guidance. decoder: the folder of another than its own vae."""
    if decoder is not None:
        check_folder(decoder)
    network = load_module(check_folder(folder) / "transformer", PixArtTransformer2DModel, dtype=torch.bfloat16)
    network.set_attn_processor(PlainAttention())
    vae = load_decoder(Weights(folder, decoder=decoder))

    def latents(prompts: Sequence[str], noise: Tensor, negatives: Sequence[str | None], scale: float | None) -> Tensor:
        if any(negative is not None for negative in negatives):
            raise InputError("the teacher takes no negative prompts")
        return teacher.draw(network, prompts, noise)

    return Sampler(
        _in_torch(network, vae, latents, TEACHER_BATCH), "teacher", _cell(network, vae), {"weights": weights_hash(folder, decoder)}
    )


def open_diffusers(folder: Path, steps: int | None = None, guidance: float | None = None) -> Sampler:
    """That of a whole text-to-image pipeline in diffusers layout, in fp32, image by image: a peer or a teacher beside a student.

    steps and guidance: None takes the pipeline's own. Its noise is torch's, from each image's seed. Raises InputError.
    """
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(check_folder(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not a whole diffusers pipeline: {why(error)}") from error
    device = default_device()
    pipe.to(device, torch.float32).set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": steps, "guidance_scale": guidance}
    settings = {name: value for name, value in settings.items() if value is not None}

    @torch.no_grad()
    def draw(prompts: Sequence[str], seeds: Sequence[int], negative: NegativeTexts = None, scale: float | None = None) -> np.ndarray:
        if scale is not None:
            raise InputError("a diffusers pipeline has no negative scale: --guidance-scale is its own")
        pictures = []
        for prompt, seed, unwanted in zip(prompts, seeds, _each(negative, len(prompts)), strict=True):
            generator = torch.Generator("cpu").manual_seed(seed)
            image = pipe(prompt, negative_prompt=unwanted, generator=generator, output_type="pil", **settings).images[0]
            pictures.append(np.asarray(image.convert("RGB")))
        return np.stack(pictures)

    facts = {
        "pipeline": type(pipe).__name__,
        "weights": weights_hash(folder),
        "engine": f"torch, {device}",
        "precision": "fp32",
        **settings,
    }
    return Sampler(draw, "peer", getattr(pipe, "vae_scale_factor", 8), facts)


def weights_hash(folder: Path, decoder: Path | None = None) -> str:
    """Of all weights of a folder in diffusers layout, and of a decoder's."""
    return fingerprint(*sorted(folder.glob("*/*.safetensors")), *([] if decoder is None else sorted(decoder.glob("*.safetensors"))))


def _bundle(folder: Path | None) -> Sampler:
    pipe, workers = snoopi_rt.load(folder), 1
    if pipe.engine == "cpu":
        # Small batches beside each other, of one thread each, are done sooner than large ones in turn, and to the same bits.
        workers = min(available_threads(), WORKERS)
        pipe = snoopi_rt.load(folder, pipe.engine, pipe.precision, threads=1)
    batch = min(BATCH // workers, pipe.max_batch)

    def draw(prompts: Sequence[str], seeds: Sequence[int], negative: NegativeTexts = None, scale: float | None = None) -> np.ndarray:
        negatives = _each(negative, len(prompts))

        def images(part: slice) -> np.ndarray:
            scales = [None if negative is None else scale for negative in negatives[part]]
            return pipe.generate(list(prompts[part]), negatives[part], scales, list(seeds[part])).images

        return np.concatenate(in_threads(images, _batches(len(prompts), batch), "images", workers))

    facts = {"bundle": pipe.bundle.name, "hash": pipe.bundle.hash, "guidance": pipe.bundle.guidance.kind, "engine": pipe.engine}
    facts["precision"] = pipe.precision
    return Sampler(draw, "student", pipe.bundle.latent.factor, facts, pipe.bundle)


def _torch_student(folder: Path) -> Sampler:
    """In fp32, with the preset's guidance, as its bundle would draw."""
    network = load_module(folder / "transformer", PixArtTransformer2DModel)
    vae, guidance = load_decoder(Weights(folder)), PRESET.guidance()
    network.set_attn_processor(GuidedAttention(guidance, torch.empty(0)))
    empty = (encode([""])[0].float(),) if guidance.measures_from_empty else ()

    @torch.no_grad()
    def latents(prompts: Sequence[str], noise: Tensor, negatives: Sequence[str | None], scale: float | None) -> Tensor:
        states, lengths = encode([*prompts, *(negative or "" for negative in negatives)])
        mask = torch.arange(states.shape[1]) < lengths[:, None]
        (positive, unwanted), (positive_mask, unwanted_mask) = states.float().split(len(prompts)), mask.split(len(prompts))
        strength = guidance.default_scale if scale is None else scale
        strengths = torch.tensor([0.0 if negative is None else strength for negative in negatives])

        def answer(step: int, x_t: Tensor) -> Tensor:
            t = torch.full((len(x_t),), PRESET.rule.steps[step].timestep)
            return pixart_prediction(network, x_t, t, positive, positive_mask, (unwanted, unwanted_mask, strengths, *empty))

        return PRESET.rule.run(answer, noise)

    facts = {"weights": weights_hash(folder), "guidance": guidance.kind}
    return Sampler(_in_torch(network, vae, latents, BATCH), "student", _cell(network, vae), facts)


def _in_torch(network: PixArtTransformer2DModel, decoder: Decoder, latents: Callable[..., Tensor], batch: int) -> DrawImages:
    shape = (network.config.in_channels, network.config.sample_size, network.config.sample_size)

    @torch.no_grad()
    def draw(prompts: Sequence[str], seeds: Sequence[int], negative: NegativeTexts = None, scale: float | None = None) -> np.ndarray:
        negatives, parts = _each(negative, len(prompts)), []
        for part in tqdm(_batches(len(prompts), batch), "images", unit="batch", leave=False, disable=len(prompts) <= 2 * batch):
            noise = torch.from_numpy(np.stack([draw_noise(seed, shape)[0] for seed in seeds[part]]))
            parts.append(torch.cat([decoder(few) for few in latents(prompts[part], noise, negatives[part], scale).split(BATCH)]).numpy())
        return np.concatenate(parts)

    return draw


@torch.no_grad()
def _cell(network: PixArtTransformer2DModel, decoder: Decoder) -> int:
    """How many pixels the decoder makes of a latent's side."""
    return decoder.pixels(torch.zeros(1, network.config.in_channels, 4, 4)).shape[-1] // 4


def _each(negative: NegativeTexts, count: int) -> list[str | None]:
    return [negative] * count if negative is None or isinstance(negative, str) else list(negative)


def _batches(count: int, batch: int) -> list[slice]:
    return [slice(start, start + batch) for start in range(0, count, batch)]
