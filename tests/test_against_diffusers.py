"""Bundles in fp32 draw what diffusers' own pipelines draw when they are called at the student's timesteps from the same noise."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_students
import torch
from diffusers.schedulers import scheduling_lcm

import snoopi_rt
from snoopi_rt.bundle import GRAPHS, Bundle
from snoopi_rt.export.origin import find_origin
from snoopi_rt.export.run import Wishes, export
from snoopi_rt.feeds import draw_noise

PROMPT = "A red cat on a mat, it's naive"
SEED = 11
SIZE = (64, 64)


@dataclass(frozen=True)
class Case:
    """A student and the call of diffusers' pipeline that draws with it. `scheduler`: the pipeline's, the folder's own where none is named."""

    folder: Any
    preset: str
    pipeline: str
    call: dict[str, Any]
    scheduler: str = ""
    settings: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = (SIZE,)
    decoder: str = "full"
    engines: tuple[str, ...] = ("cpu",)
    other: dict[str, Any] = field(default_factory=dict)


SDXL = {"pipeline": "StableDiffusionXLPipeline", "scheduler": "LCMScheduler"}
CASES = {
    "pixart-alpha 512": Case(
        lambda path: tiny_students.pixart(path),
        "pixart-dmd",
        "PixArtAlphaPipeline",
        {"timesteps": [400]},
        sizes=(SIZE, (64, 128), (128, 96)),
    ),
    "pixart-alpha 1024": Case(
        lambda path: tiny_students.pixart(path, sample_size=128, prediction="v_prediction", tiny_vae=True),
        "yoso-pixart-1024",
        "PixArtAlphaPipeline",
        {"timesteps": [999]},
        sizes=((64, 96),),
    ),
    "pixart-sigma": Case(
        lambda path: tiny_students.pixart(path, sample_size=128, scaling=0.13025, use_additional_conditions=False, tiny_vae=True),
        "nitro-pixart",
        "PixArtSigmaPipeline",
        {"timesteps": [400]},
    ),
    "sd15": Case(
        lambda path: tiny_students.stable_diffusion(path, "sd15"),
        "dmd2-sd15",
        "StableDiffusionPipeline",
        {"timesteps": [999]},
        scheduler="DDPMScheduler",
        sizes=(SIZE, (64, 128), (128, 192)),
    ),
    "sd21": Case(
        lambda path: tiny_students.stable_diffusion(path, "sd21", scheduler="EulerDiscreteScheduler", tiny_vae=True),
        "sd-turbo",
        "StableDiffusionPipeline",
        {},
    ),
    "sdxl": Case(lambda path: tiny_students.stable_diffusion(path, "sdxl"), "dmd2-sdxl", call={"timesteps": [399]}, **SDXL),
    "sdxl 4 steps": Case(
        lambda path: tiny_students.stable_diffusion(path, "sdxl", levels=1, tiny_vae=True),
        "dmd2-sdxl-4step",
        call={"timesteps": [999, 749, 499, 249]},
        **SDXL,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_x(name, tmp_path, monkeypatch):
    case = CASES[name]
    folder = case.folder(tmp_path / "w")
    settings = case.settings
    if name == "sd15": settings = ("alpha=0.06826481",)
    origin = find_origin(preset=case.preset, weights=str(folder), settings=settings)
    bundle = export(origin, tmp_path / "bundle", Wishes(sizes=case.sizes, precision=dict.fromkeys(GRAPHS, ["fp32"])), print)
    pipe = getattr(diffusers, case.pipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if case.scheduler:
        pipe.scheduler = getattr(diffusers, case.scheduler).from_config(pipe.scheduler.config)
    ours = snoopi_rt.load(bundle.folder, engine="cpu")
    for h, w in case.sizes:
        latent = (4, h // 8, w // 8)
        steps = len(case.call.get("timesteps", [0]))
        noise, renoise = draw_noise(SEED, latent, steps - 1)
        given = iter(torch.from_numpy(renoise)[:, None])
        monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: next(given))
        more = {"use_resolution_binning": False, "clean_caption": False} if "PixArt" in case.pipeline else {}
        def draw(**call):
            return pipe(PROMPT, height=h, width=w, num_inference_steps=steps, guidance_scale=0.0, latents=torch.from_numpy(noise)[None], output_type="np", **{**call, **more}).images
        theirs = draw(**case.call)
        image = ours.generate(PROMPT, seed=SEED, size=(h, w)).images
        print(name, (h, w), np.abs(image - 255 * theirs).max(), "sat", np.mean((theirs <= 0) | (theirs >= 1)), theirs.std())
