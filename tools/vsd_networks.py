"""PG-SB with networks: fixed against random kappa on two architectures, several seeds, all else alike.

A transformer in PixArt's manner and a UNet with cross-attention in Stable Diffusion's, of at most 2 M parameters each, learn the emoji
pictures at 64 x 64 pixels as teachers; then every setting of kappa distils each of them with the same seeds. Measured is the Frechet
distance of the student's pictures of held-out captions to real ones, in the features of a scorer, beside what the teacher itself reaches
in 25 steps and the untrained student in one. Each core works on a run of its own. One command, which resumes after an interruption:

    python tools/vsd_networks.py --data runs/emoji --vae weights/small/teacher/vae --scorers weights/small/scorers \
        --work runs/vsd_networks --out docs/vsd_networks.json
"""

import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import AutoencoderTiny, PixArtTransformer2DModel, UNet2DConditionModel
from PIL import Image
from torch import nn
from tqdm import tqdm
from vsd_networks_report import report

from snoopi_rt.export.attention import PlainAttention
from snoopi_rt.export.backbones import Denoiser, Weights, find_backbone
from snoopi_rt.export.backbones.network import load_decoder
from snoopi_rt.export.backbones.unet import unet_answer
from snoopi_rt.export.evaluation.statistics import frechet
from snoopi_rt.export.presets.choose import default_preset
from snoopi_rt.export.settings import changed
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.models import Models
from snoopi_rt.export.training.optimise import MasterWeights, learning_rate
from snoopi_rt.export.training.processes import Processes
from snoopi_rt.export.training.recipe import StudentRecipe
from snoopi_rt.export.training.schedule import Schedule
from snoopi_rt.export.training.small.autoencoder import to_network
from snoopi_rt.export.training.small.emoji import compose, fetch_sprites, open_pictures, read_rows
from snoopi_rt.export.training.small.scorer import KINDS, open_scorer
from snoopi_rt.export.training.small.teacher import schedule
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.training.text_states import TextBatch, TextStates, encode_prompts
from snoopi_rt.export.training.trainer import Trainer
from snoopi_rt.export.weights.files import fingerprint, save_diffusers, save_tensors

SIDE, CHANNELS = 8, 8  # of a latent of 64 x 64 pixels
LOW, HIGH = 1.0, 3.5
MEAN = (LOW + HIGH) / 2
SETTINGS: dict[str, dict[str, Any]] = {
    "random on both": {"guidance.random_on": "both"},
    "random on the frozen teacher": {"guidance.random_on": "frozen"},
    "random on the LoRA teacher": {"guidance.random_on": "lora"},
    **{f"fixed {kappa:g}": {"guidance.min": kappa, "guidance.max": kappa} for kappa in (1.5, MEAN, 3.0, 4.5)},
}


def transformer() -> nn.Module:
    """PixArt's transformer, 0.7 M parameters."""
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=48,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=4,
        cross_attention_dim=96,
        sample_size=SIDE,
        patch_size=1,
        caption_channels=384,
        use_additional_conditions=False,
    )
    nn.init.zeros_(network.proj_out.weight)
    return network


def unet() -> nn.Module:
    """A UNet with cross-attention at both levels, 1.3 M parameters."""
    network = UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=384,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    nn.init.zeros_(network.conv_out.weight)
    return network


_SMALL = find_backbone("small").denoiser()
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Denoiser]] = {
    "transformer": (transformer, _SMALL),
    "unet": (
        unet,
        replace(
            _SMALL,
            kind=UNet2DConditionModel,
            part="unet",
            # The empty tokens behind a prompt are zero and count, as CLIP's do.
            answer=unet_answer,
            lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
            masked=False,
        ),
    ),
}


@dataclass(frozen=True)
class Grid:
    """What all runs share. work: where teachers, text states and finished runs are kept."""

    data: Path
    vae: Path
    scorers: Path
    work: Path
    teacher_steps: int
    steps: int
    lr: float
    samples: int

    def teacher(self, name: str) -> Path:
        """The folder of a teacher, which other learning rates share."""
        return self.work.parent / f"teacher-{name}-{self.teacher_steps}"

    def file(self, name: str, run: str) -> Path:
        """Where a run's result is."""
        return self.work / "runs" / f"{name}, {run}.json"


def train_teacher(name: str, grid: Grid) -> None:
    """A teacher of one architecture in diffusers layout, v-prediction, 10 % empty captions."""
    build, denoiser = ARCHITECTURES[name]
    folder = grid.teacher(name)
    if (folder / denoiser.part / "config.json").exists():
        return
    shutil.copytree(grid.vae, folder / "vae", dirs_exist_ok=True)
    schedule().save_pretrained(folder / "scheduler")
    latents, texts = _latents(grid), _captions(grid)
    torch.manual_seed(0)
    model, noise = build().bfloat16(), Schedule.of(folder)
    model.set_attn_processor(PlainAttention())
    print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    weights = MasterWeights(model, ema=0.999)
    recipe = loop.StageRecipe(grid.teacher_steps, 64, 1e-3)

    def step(i: int, random: torch.Generator) -> dict[str, float]:
        chosen = torch.randint(len(latents), (recipe.batch,), generator=random)
        empty = torch.rand(recipe.batch, generator=random) < 0.1
        text = texts.batch([-1 if none else row for row, none in zip(chosen.tolist(), empty.tolist(), strict=True)])
        x0, eps = latents[chosen].float(), torch.randn(recipe.batch, CHANNELS, SIDE, SIDE, generator=random)
        t = torch.randint(1000, (recipe.batch,), generator=random)
        mask = text.mask if denoiser.masked else None
        prediction = denoiser.answer(model, noise.noised(x0, eps, t).bfloat16(), t, text.states, mask, None).float()
        loss = nn.functional.mse_loss(prediction, noise.target(x0, eps, t))
        loss.backward()
        return {"loss": loss.item(), "norm": weights.step(learning_rate(recipe.lr, i, recipe.steps))}

    loop.run(loop.Stage(f"teacher {name}", folder, recipe, {"architecture": name}), {"teacher": weights}, step, _nothing)
    save_diffusers(weights.averaged(build()), folder / denoiser.part)


def distillation(name: str, setting: dict[str, Any], seed: int, grid: Grid) -> Trainer:
    """A run that has not begun: the student is the teacher."""
    _, denoiser = ARCHITECTURES[name]
    teacher = grid.teacher(name)
    recipe = changed(
        StudentRecipe(),
        {
            "steps": grid.steps,
            "batch": 16,
            "lr": grid.lr,
            "seed": seed,
            "guidance.min": LOW,
            "guidance.max": HIGH,
            "timestep": 999,
            "optimiser.beta1": 0.0,
            "optimiser.beta2": 0.99,
            "optimiser.decay_from": 0.7,
            "optimiser.ema": 0.99,
            "lora.rank": 32,
            "lora.alpha": 64,
            "collapse": 0.0,
            **setting,
        },
    )
    task = Task("small", teacher, grid.data / "prompts.txt", grid.work / "none", states=grid.work.parent / f"states-{name}")
    return Trainer(task, recipe, denoiser, Schedule.of(teacher), Processes())


def prepare(name: str, grid: Grid) -> None:
    """A teacher, its text states, and what it reaches itself: in one call untrained, in 25 steps guided by the mean."""
    torch.set_num_threads(1)
    train_teacher(name, grid)
    if not grid.file(name, "teacher").exists():
        trainer = distillation(name, {}, 0, grid)
        models, prompts, scale = trainer.run.models, trainer.run.prompts, trainer.run.recipe.mean_guidance_scale
        own = _distance(grid, models, lambda noise, text: models.sample_teacher(noise, text, prompts.unconditional(len(noise)), 25, scale))
        start = _distance(grid, models, models.clean)
        _keep(grid.file(name, "teacher"), {"architecture": name, "teacher": own, "untrained": start})


def distil(name: str, setting: str, seed: int, grid: Grid) -> None:
    """One run: its distance at the end, or where it stopped."""
    torch.set_num_threads(1)
    began, cpu = time.perf_counter(), time.process_time()
    found: dict[str, Any] = {"architecture": name, "kappa": setting, "seed": seed}
    trainer, log = distillation(name, SETTINGS[setting], seed, grid), []
    for i in range(grid.steps):
        scalars = trainer.step(i)
        log.append(scalars["vsd"])
        if not all(map(math.isfinite, scalars.values())):
            found["stopped"] = i
            break
    else:
        trainer.weights.publish(averaged=True)
        found["distance"] = _distance(grid, trainer.run.models, trainer.run.models.clean)
        found["vsd"] = float(np.mean(log[-50:]))
    _keep(
        grid.file(name, f"{setting}, {seed}"), {**found, "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    )


@torch.no_grad()
def _distance(grid: Grid, models: Models, draw: Callable[..., torch.Tensor]) -> float:
    """The Frechet distance of what draw(noise, text) makes of held-out captions to real pictures."""
    scorer, decoder, captions, seen, _ = _judge(grid)
    texts = _held_out(grid, captions)
    noise, pictures = torch.randn(len(captions), CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1)), []
    for start in range(0, len(captions), 50):
        rows = range(start, min(start + 50, len(captions)))
        text = texts.batch(rows)
        text = TextBatch(text.states.to(models.dtype), text.mask if models.denoiser.masked else None)
        pictures.append(decoder(draw(noise[start : rows.stop], text)).numpy())
    return frechet(scorer(np.concatenate(pictures))[0], seen)


@cache
def _judge(grid: Grid) -> tuple[Any, nn.Module, list[str], Any, float]:
    """A scorer, the decoder, held-out captions, the features of their real pictures, and how far other real pictures are from those."""
    scorer, sprites = open_scorer(KINDS[1], grid.scorers, grid.data / "npm"), fetch_sprites(grid.data / "npm")
    (real, captions), (other, _) = (_real_pictures(sprites, grid.samples, seed) for seed in (0, 1))
    seen, floor = (scorer(_small(pictures))[0] for pictures in (real, other))
    decoder = load_decoder(Weights(grid.vae.parent, decoder=grid.vae))
    return scorer, decoder, captions, seen, frechet(floor, seen)


def _real_pictures(sprites: dict, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Pictures of the test split with their captions."""
    rows = [compose(sprites, np.random.default_rng([seed, i]), split="test") for i in range(count)]
    return np.stack([picture for _, picture in rows]), [row.caption for row, _ in rows]


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="What `snoopi-rt data emoji` wrote.")
@click.option("--vae", type=click.Path(path_type=Path), required=True, help="The small model's vae.")
@click.option("--scorers", type=click.Path(path_type=Path), required=True, help="The small model's scorers; trained if they are not there.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where teachers and finished runs are kept.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--seeds", default=5)
@click.option("--teacher-steps", default=4000)
@click.option("--steps", default=300)
@click.option("--lr", default=2e-4)
@click.option("--samples", default=1500)
def main(
    data: Path, vae: Path, scorers: Path, work: Path, out: Path, seeds: int, teacher_steps: int, steps: int, lr: float, samples: int
) -> None:
    """Train what is missing, run what was not run yet, and write table, JSON and plot of what there is."""
    # Another extent or other data are another grid.
    work = work / fingerprint(data / "dataset.json", vae / "config.json")[:8] / f"{teacher_steps}-{steps}-{lr:g}-{samples}"
    grid = Grid(data, vae, scorers, work, teacher_steps, steps, lr, samples)
    (work / "runs").mkdir(parents=True, exist_ok=True)
    # What the processes share is made before them.
    _latents(grid)
    _captions(grid)
    _, _, captions, _, floor = _judge(grid)
    _held_out(grid, captions)
    # Seed by seed: what was stopped early still has all settings.
    cells = [(name, setting, seed) for seed in range(seeds) for name in ARCHITECTURES for setting in SETTINGS]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(prepare, ARCHITECTURES, [grid] * len(ARCHITECTURES)))
        runs = [pool.submit(distil, *cell, grid) for cell in cells if not grid.file(cell[0], f"{cell[1]}, {cell[2]}").exists()]
        for run in tqdm(as_completed(runs), "runs", len(runs), unit="run"):
            run.result()
    facts = {"steps": steps, "lr": lr, "teacher_steps": teacher_steps, "samples": samples, "kappa": [LOW, HIGH], "real to real": floor}
    report(work / "runs", list(ARCHITECTURES), list(SETTINGS), f"fixed {MEAN:g}", facts, out)


def _encoder() -> Any:
    return _SMALL.caption_encoder(Path(), default_preset("small").max_tokens)


def _captions(grid: Grid) -> TextStates:
    """Of the training pictures, with masks."""
    rows = [row for row in read_rows(grid.data) if row.split == "train"]
    return encode_prompts(
        lambda: [row.caption for row in rows], fingerprint(grid.data / "dataset.json"), _encoder(), True, grid.work.parent / "captions"
    )


def _held_out(grid: Grid, captions: list[str]) -> TextStates:
    return encode_prompts(lambda: captions, f"held out {grid.samples}", _encoder(), True, grid.work.parent / f"held-out-{grid.samples}")


def _small(pictures: np.ndarray) -> np.ndarray:
    """uint8 (N, 128, 128, 3) to half the sides."""
    return pictures.reshape(len(pictures), 64, 2, 64, 2, 3).mean((2, 4)).round().astype(np.uint8)


@torch.no_grad()
def _latents(grid: Grid) -> torch.Tensor:
    """The training pictures at 64 x 64 as latents (N, 8, 8, 8) fp16, computed once."""
    from safetensors.torch import load_file

    file = grid.work.parent / "latents.safetensors"
    if not file.exists():
        pictures, model = open_pictures(grid.data), AutoencoderTiny.from_pretrained(grid.vae).eval()
        chosen = [i for i, row in enumerate(read_rows(grid.data)) if row.split == "train"]
        found = [
            model.encoder(to_network(_small(np.stack([pictures[i] for i in chosen[start : start + 128]])))).half()
            for start in tqdm(range(0, len(chosen), 128), desc="latents", unit="batch")
        ]
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(file, {"latents": torch.cat(found)})
    return load_file(file)["latents"]


def _keep(file: Path, found: dict[str, Any]) -> None:
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(found) + "\n", encoding="utf-8")
    beside.replace(file)


def _nothing(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path)


if __name__ == "__main__":
    main()
