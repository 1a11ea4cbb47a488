"""Bundles in fp32 draw what diffusers' own pipelines draw when those are called at the student's timesteps from the same noise.

With a negative prompt, too, where the pipelines got one by `with_negative`.
"""

from collections.abc import Callable
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
from snoopi_rt.bundle.bundle import GRAPHS
from snoopi_rt.diffusers import with_negative
from snoopi_rt.export.exporter import export
from snoopi_rt.export.options import ExportOptions
from snoopi_rt.export.source import find_source
from snoopi_rt.runtime.inputs import draw_noise

# Euler's sigmas (numpy), and a cast in SDXL's.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPT, NEGATIVE = "A red cat on a mat, it's naive", "a blue dog in the fog"
SEED = 11
ROUNDING = 0.5
BEFORE_UINT8 = 1e-3


@dataclass(frozen=True)
class Case:
    """A student's folder, its preset, and the call of diffusers' pipeline that draws with it.

    `scheduler`: the pipeline's, the folder's own where none is named. `other`: a change of the call that must be seen.
    """

    make: Callable[[Path], Path]
    preset: str
    pipeline: str
    call: dict[str, Any]
    other: dict[str, Any]
    scheduler: str = ""
    settings: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ((64, 64),)
    options: dict[str, Any] = field(default_factory=dict)


PIXART = {"use_resolution_binning": False, "clean_caption": False, "guidance_scale": 1.0}
SD = {"guidance_scale": 0.0}
STORED = {"prompts": (PROMPT, NEGATIVE), "prompts_only": True}  # saves the time to export a text encoder of each kind twice
CASES = {
    "PixArt-alpha 512, three sizes": Case(
        lambda path: tiny_students.pixart(path),
        "pixart-dmd",
        "PixArtAlphaPipeline",
        {**PIXART, "timesteps": [400]},
        {"timesteps": [399]},
        sizes=((64, 64), (64, 128), (112, 96)),
    ),
    "PixArt-alpha 1024, v prediction": Case(
        lambda path: tiny_students.pixart(path, sample_size=128, prediction="v_prediction", tiny_vae=True),
        "yoso-pixart-1024",
        "PixArtAlphaPipeline",
        {**PIXART, "timesteps": [999]},
        {"timesteps": [990]},
        sizes=((64, 96),),
        options=STORED,
    ),
    "PixArt-sigma": Case(
        lambda path: tiny_students.pixart(path, sample_size=128, scaling=0.13025, use_additional_conditions=False, tiny_vae=True),
        "nitro-pixart",
        "PixArtSigmaPipeline",
        {**PIXART, "timesteps": [400]},
        {"timesteps": [399]},
        options=STORED,
    ),
    "SD 1.5, Euler, two sizes": Case(
        lambda path: tiny_students.stable_diffusion(path, "sd15", scheduler="EulerDiscreteScheduler"),
        "sdxs-dreamshaper",
        "StableDiffusionPipeline",
        SD,
        {"guidance_scale": 2.0},
        sizes=((64, 64), (128, 192)),
    ),
    "SD 2.1, DDPM": Case(
        lambda path: tiny_students.stable_diffusion(path, "sd21", tiny_vae=True),
        "nitro-sd",
        "StableDiffusionPipeline",
        {**SD, "timesteps": [999]},
        {"timesteps": [990]},
        options=STORED,
    ),
    "SDXL, LCM": Case(
        lambda path: tiny_students.stable_diffusion(path, "sdxl"),
        "dmd2-sdxl",
        "StableDiffusionXLPipeline",
        {**SD, "timesteps": [399]},
        {"original_size": (96, 64)},
        scheduler="LCMScheduler",
        sizes=((64, 128),),
    ),
    "SDXL, LCM, 4 steps, time ids of its own": Case(
        lambda path: tiny_students.stable_diffusion(path, "sdxl", levels=1, tiny_vae=True, mid_block_type=None),
        "dmd2-sdxl-4step",
        "StableDiffusionXLPipeline",
        {
            **SD,
            "timesteps": [999, 749, 499, 249],
            "original_size": (512, 768),
            "crops_coords_top_left": (1, 2),
            "target_size": (256, 384),
        },
        {"timesteps": [999, 749, 499, 399]},
        scheduler="LCMScheduler",
        settings=("size=64", "time_ids=512,768,1,2,256,384"),
        options=STORED,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bundle_draws_what_the_diffusers_pipeline_draws(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    folder = case.make(tmp_path / "weights")
    options = ExportOptions(sizes=case.sizes, precision={graph: ["fp32"] for graph in GRAPHS}, **case.options)
    bundle = export(find_source(preset=case.preset, weights=str(folder), settings=case.settings), tmp_path / "bundle", options)
    pipeline = getattr(diffusers, case.pipeline).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if case.scheduler:
        pipeline.scheduler = getattr(diffusers, case.scheduler).from_config(pipeline.scheduler.config)
    steps = len(case.call.get("timesteps", [None]))

    def theirs(size: tuple[int, int], **change: Any) -> np.ndarray:
        height, width = size
        noise, renoise = draw_noise(SEED, (4, height // 8, width // 8), steps - 1)
        # LCM draws its noise inside: diffusers has no other way to hand it over.
        noises = iter(torch.from_numpy(renoise)[:, None])
        monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: next(noises))
        latents = torch.from_numpy(noise)[None]
        call = {"height": height, "width": width, "num_inference_steps": steps, "latents": latents, "output_type": "np", **case.call}
        return pipeline(PROMPT, **{**call, **change}).images * 255

    with snoopi_rt.load(bundle, engine="cpu") as ours:
        for size in case.sizes:
            image, reference = ours.generate(PROMPT, seed=SEED, size=size).images.astype(np.float64), theirs(size)
            assert reference.std() > 8 and np.mean((reference == 0) | (reference == 255)) < 0.2
            assert np.abs(image - reference).max() <= ROUNDING + 255 * BEFORE_UINT8
        assert np.abs(image - theirs(size, **case.other)).max() > 1
        with_negative(pipeline)
        guided = ours.generate(PROMPT, NEGATIVE, 0.7, seed=SEED, size=size).images.astype(np.float64)
        assert np.abs(guided - image).max() > 1
        reference = theirs(size, negative_prompt=NEGATIVE, negative_scale=0.7)
        assert np.abs(guided - reference).max() <= ROUNDING + 255 * BEFORE_UINT8
