"""The last stage of the small model: a lighter decoder, trained on what the student draws.

It learns to make of the student's latents what the teacher's decoder makes of them. No image is needed. (Towards the pictures of the
teacher's own latents it learns to blur: where the two differ no decoder can know how.)
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn
from tqdm import tqdm

from snoopi_rt.errors import InputError
from snoopi_rt.export.attention import PlainAttention
from snoopi_rt.export.device import default_device
from snoopi_rt.export.small_model import decoder, teacher
from snoopi_rt.export.small_model.features import weights_file
from snoopi_rt.export.small_model.networks import PixelShuffleDecoder, to_pictures
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.prompt_files import read_prompts
from snoopi_rt.export.training.teacher_pictures import TeacherPictures
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.files import WEIGHTS, fingerprint, require
from snoopi_rt.files import check_folder, sha256

BATCH = 256
SHAPE = (8, 16, 16)


def train(student: Path, teacher_folder: Path, prompts: Path, out: Path, recipe: decoder.DecoderRecipe, compiled: bool = False) -> None:
    """Trains a light decoder, from the first stages of the teacher's, on the student's latents of the first prompts; in fp16 in `out`.

    Raises InputError for fewer prompts than recipe.images, and as loop.run does.
    """
    network = require(check_folder(student) / "transformer", "train student")
    vae = require(check_folder(teacher_folder) / "vae", "train teacher")
    frozen = load_module(vae, PixelShuffleDecoder)
    weights_file("lite1")  # before anything is drawn
    texts = list(islice(read_prompts(prompts), recipe.images))
    if len(texts) < recipe.images:
        raise InputError(f"{prompts} has {len(texts)} prompts, fewer than {recipe.images}: --set images={len(texts)} takes them")
    inputs = {"student": fingerprint(network / WEIGHTS), "decoder": fingerprint(vae / WEIGHTS), "prompts": sha256(prompts)}
    stage = loop.Stage("student decoder", out, recipe, inputs, sample_every=500, former_names=decoder.FORMER_NAMES)
    loop.first_step(stage)
    latents = _drawn(network, texts, recipe.seed, out, stage.inputs)
    in_bf16 = load_module(vae, PixelShuffleDecoder, dtype=torch.bfloat16)
    in_bf16.to(default_device(), memory_format=torch.channels_last)

    @torch.no_grad()
    def targets(numbers: list[int], corners: list[list[int]]) -> Tensor:
        windows = decoder.cut(latents, numbers, corners).to(in_bf16.device, in_bf16.dtype)
        pictures = in_bf16.decoder(windows.contiguous(memory_format=torch.channels_last)).clamp(-1, 1)
        # The outermost pixels are their neighbours': convolutions that see zeros beyond the edge draw a dot into each corner.
        return nn.functional.pad(pictures[..., 1:-1, 1:-1], (1, 1, 1, 1), mode="replicate")

    torch.manual_seed(recipe.seed)  # for the last stage, which is new
    decoder.fit(stage, _light(frozen), latents, targets, to_pictures(frozen, latents[: decoder.SHOWN]), recipe, compiled)


def _light(start: PixelShuffleDecoder) -> PixelShuffleDecoder:
    """The decoder with nothing computed at full resolution: its first stages, and a new last one."""
    light = PixelShuffleDecoder(**{**start.config, "last_blocks": 0})
    light.decoder.layers.load_state_dict(start.decoder.layers.state_dict())
    return light


def _drawn(network: Path, texts: list[str], seed: int, out: Path, inputs: Mapping[str, str]) -> Tensor:
    """The student's latents (N, 8, 16, 16) of the prompts in one call, each from its own noise."""
    model = load_module(network, PixArtTransformer2DModel, dtype=torch.bfloat16).to(default_device())
    model.set_attn_processor(PlainAttention())

    def draw(numbers: Sequence[int]) -> Tensor:
        noise = torch.stack([torch.randn(SHAPE, generator=loop.random_stream(seed, "decoder", number)) for number in numbers])
        return teacher.draw(model, [texts[number] for number in numbers], noise, steps=1, guidance_scale=1.0)

    key = hashlib.sha256(json.dumps([inputs["student"], inputs["prompts"], seed]).encode()).hexdigest()[:16]
    pictures = TeacherPictures(out / "latents", f"student-{key}", len(texts), SHAPE, draw)
    numbers = range(len(texts))
    with tqdm(numbers, desc="the student's images", unit="image") as bar:
        parts = []
        for start in numbers[::BATCH]:
            parts.append(pictures.latents(list(numbers[start : start + BATCH])).half())
            bar.update(len(parts[-1]))
    return torch.cat(parts)
