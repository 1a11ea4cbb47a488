"""PG-SB from a teacher's folder and a file of prompts to a student's folder."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from snoopi_rt.engines.base import InputError
from snoopi_rt.export.backbones import Denoiser, find_backbone
from snoopi_rt.export.presets.preset import written
from snoopi_rt.export.presets.rows import PRESETS
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.distillation import Distillation, own_preset
from snoopi_rt.export.training.processes import Processes
from snoopi_rt.export.training.recipe import Recipe
from snoopi_rt.export.training.schedule import Schedule
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.weights.files import fingerprint, save_diffusers
from snoopi_rt.files import sha256

__all__ = ["Task", "train", "write_beside"]


def train(task: Task, recipe: Recipe, compiled: bool = False, sample_every: int = 250) -> str:
    """Distils and writes the student to `task.out` in diffusers layout: what export reads; text encoder and decoder are the teacher's.

    Gives the name of the preset that reads it, with its settings, as on the command line of export. Raises InputError for folders and
    recipes that do not fit, OutputError as loop.run does.
    """
    processes = Processes()
    if recipe.batch % processes.count:
        raise InputError(f"a batch of {recipe.batch} cannot be shared among {processes.count} processes")
    denoiser, schedule = find_backbone(task.backbone).denoiser(), Schedule.of(task.teacher)
    distillation = Distillation(task, recipe, denoiser, schedule, processes, compiled)
    stage = loop.Stage("student", task.out, recipe, _inputs(task, denoiser), sample_every, wrong=distillation.wrong)
    parts = {"student": distillation.weights, "lora": distillation.lora_weights}
    if distillation.discriminator is not None:
        parts["heads"] = distillation.head_weights
    loop.run(stage, parts, lambda i, random: distillation.step(i), distillation.sample, processes)
    if processes.main:
        write_beside(task.teacher, denoiser.part, distillation.finished(), task.out)
    return _preset(distillation)


def _preset(distillation: Distillation) -> str:
    """The preset by which export reads the student, with the settings in which the student differs from it."""
    rule, preset = distillation.rule, PRESETS[own_preset(distillation.task.backbone)]
    wanted = {"timestep": rule.timestep, "prediction": rule.prediction, "alpha": rule.alpha, "sigma": rule.sigma}
    wanted |= {"size": distillation.size[0], "vae_scaling": distillation.preset.vae_scaling}
    own = {name: getattr(preset.rule if hasattr(preset.rule, name) else preset, name) for name in wanted}
    given = [f"--set {name}={written(value)}" for name, value in wanted.items() if not _same(value, own[name])]
    return " ".join([preset.name, *given])


def _same(one: Any, other: Any) -> bool:
    return one == other if isinstance(one, str) else math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-6)


def _inputs(task: Task, denoiser: Denoiser) -> dict[str, str]:
    """Fingerprints of all that a resumed run must find unchanged."""
    files = {
        "prompts": task.prompts,
        "negatives": task.negatives,
        "edits": task.edits,
        "scheduler": task.teacher / "scheduler" / "scheduler_config.json",
    }
    weights = {"teacher": task.teacher / denoiser.part, "student": task.student and task.student / denoiser.part, "clip": task.clip}
    return {
        "backbone": task.backbone,
        **{name: sha256(file) for name, file in files.items() if file},
        **{name: fingerprint(*sorted(file for file in folder.iterdir() if file.is_file())) for name, folder in weights.items() if folder},
    }


def write_beside(folder: Path, part: str, network: nn.Module, out: Path) -> None:
    """Writes the network as the `part` of `out`, beside all other parts of a diffusers folder: copies, but links to its text encoders."""
    out.mkdir(parents=True, exist_ok=True)
    for other in sorted(folder.iterdir()):
        target, beside = out / other.name, out / f".{other.name}.part"
        if other.name == part or target.exists() or not (other.name == "model_index.json" or list(other.glob("*.json"))):
            continue
        if other.is_file():
            shutil.copyfile(other, target)
        elif other.name.startswith("text_encoder"):
            # T5 has 19 GB.
            target.unlink(missing_ok=True)
            target.symlink_to(os.path.relpath(other.resolve(), out.resolve()))
        else:
            shutil.rmtree(beside, ignore_errors=True)
            shutil.copytree(other, beside)
            beside.rename(target)
    save_diffusers(network, out / part)
