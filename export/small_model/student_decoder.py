"""The last stage of the small model: a lighter decoder, trained on what the student draws.

It learns to make of the student's latents, which lack some of the teacher's detail, the picture that the teacher's decoder makes of the
teacher's latents of the same noise and prompt. No image is needed.
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
from snoopi_rt.export.settings import flattened
from snoopi_rt.export.small_model import decoder, teacher
from snoopi_rt.export.small_model.features import weights_file
from snoopi_rt.export.small_model.networks import PixelShuffleDecoder, to_pictures
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.prompt_files import read_prompts
from snoopi_rt.export.training.recipes import find_recipe
from snoopi_rt.export.training.teacher_pictures import TeacherPictures
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.files import WEIGHTS, fingerprint, require
from snoopi_rt.files import check_folder, sha256

BATCH = 256
RECIPE = find_recipe("embedded")
"""By which the student was distilled: the teacher's steps and guidance."""
SHAPE = (8, 16, 16)


def train(student: Path, teacher_folder: Path, prompts: Path, out: Path, recipe: decoder.DecoderRecipe, compiled: bool = False) -> None:
    """Trains a light decoder, from the first stages of the teacher's, on the student's latents of the first prompts; in fp16 in `out`.

    Raises InputError for fewer prompts than recipe.pictures, and as loop.run does.
    """
    networks = {"student": require(check_folder(student) / "transformer", "train student")}
    networks["teacher"] = require(check_folder(teacher_folder) / "transformer", "train teacher")
    frozen = load_module(require(teacher_folder / "vae", "train teacher"), PixelShuffleDecoder)
    weights_file("lite1")  # before anything is drawn
    texts = list(islice(read_prompts(prompts), recipe.pictures))
    if len(texts) < recipe.pictures:
        raise InputError(f"{prompts} has {len(texts)} prompts, fewer than {recipe.pictures}: --set pictures={len(texts)} takes them")
    inputs = {name: fingerprint(folder / WEIGHTS) for name, folder in (*networks.items(), ("decoder", teacher_folder / "vae"))}
    stage = loop.Stage("student decoder", out, recipe, {**inputs, "prompts": sha256(prompts)}, sample_every=500)
    loop.first_step(stage)
    of_student, of_teacher = (_drawn(networks[name], name, texts, recipe.seed, out, stage.inputs) for name in ("student", "teacher"))
    in_bf16 = load_module(teacher_folder / "vae", PixelShuffleDecoder, dtype=torch.bfloat16)
    in_bf16.to(default_device(), memory_format=torch.channels_last)

    @torch.no_grad()
    def targets(numbers: list[int], corners: list[list[int]]) -> Tensor:
        windows = decoder.cut(of_teacher, numbers, corners).to(in_bf16.device, in_bf16.dtype)
        pictures = in_bf16.decoder(windows.contiguous(memory_format=torch.channels_last)).clamp(-1, 1)
        # The outermost pixels are their neighbours': convolutions that see zeros beyond the edge draw a dot into each corner.
        return nn.functional.pad(pictures[..., 1:-1, 1:-1], (1, 1, 1, 1), mode="replicate")

    shown = to_pictures(frozen, of_teacher[: decoder.SHOWN])
    decoder.fit(stage, _light(frozen), of_student, targets, shown, recipe, compiled)


def _light(start: PixelShuffleDecoder) -> PixelShuffleDecoder:
    """The decoder with nothing computed at full resolution: its first stages, and a new last one."""
    light = PixelShuffleDecoder(**{**start.config, "last_blocks": 0})
    light.decoder.layers.load_state_dict(start.decoder.layers.state_dict())
    return light


def _drawn(network: Path, name: str, texts: list[str], seed: int, out: Path, inputs: Mapping[str, str]) -> Tensor:
    """Latents (N, 8, 16, 16) of the prompts, each from its own noise: the student's in one call, the teacher's in several."""
    model = load_module(network, PixArtTransformer2DModel, dtype=torch.bfloat16).to(default_device())
    model.set_attn_processor(PlainAttention())
    steps = 1 if name == "student" else flattened(RECIPE)["regression.teacher_steps"]
    guidance_scale = 1.0 if name == "student" else RECIPE.mean_guidance_scale

    def draw(numbers: Sequence[int]) -> Tensor:
        noise = torch.stack([torch.randn(SHAPE, generator=loop.generator(seed, "decoder", number)) for number in numbers])
        return teacher.draw(model, [texts[number] for number in numbers], noise, steps, guidance_scale)

    key = hashlib.sha256(json.dumps([inputs[name], inputs["prompts"], seed, steps, guidance_scale]).encode()).hexdigest()[:16]
    pictures = TeacherPictures(out / "latents", f"{name}-{key}", len(texts), SHAPE, draw)
    numbers = range(len(texts))
    with tqdm(numbers, desc=f"the {name}'s pictures", unit="picture") as bar:
        parts = []
        for start in numbers[::BATCH]:
            parts.append(pictures.latents(list(numbers[start : start + BATCH])).half())
            bar.update(len(parts[-1]))
    return torch.cat(parts)
