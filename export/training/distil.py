"""PG-SB from a teacher's folder and a file of prompts to a student's folder."""

import os
import shutil
from pathlib import Path

from torch import nn

from snoopi_rt.engines.base import InputError
from snoopi_rt.export.backbones import Denoiser, find_backbone
from snoopi_rt.export.one_step import OneStepRule
from snoopi_rt.export.preset import written
from snoopi_rt.export.presets import PRESETS
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.distillation import Distillation, Task
from snoopi_rt.export.training.processes import Processes
from snoopi_rt.export.training.recipe import Recipe
from snoopi_rt.export.training.schedule import Schedule
from snoopi_rt.export.weights import fingerprint, save_diffusers
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
    loop.run(stage, parts, lambda i, random: distillation.step(i), distillation.sample, processes)
    if processes.main:
        write_beside(task.teacher, denoiser.part, distillation.finished(), task.out)
    return _preset(task.backbone, distillation.rule)


def _preset(backbone: str, rule: OneStepRule) -> str:
    preset = PRESETS[backbone if backbone in PRESETS else f"pgsb-{backbone}"]
    settings = {"timestep": rule.timestep, "prediction": rule.prediction}
    own = {"timestep": preset.timestep[0], "prediction": preset.prediction}
    return " ".join([preset.name, *(f"--set {name}={written(value)}" for name, value in settings.items() if value != own[name])])


def _inputs(task: Task, denoiser: Denoiser) -> dict[str, str]:
    """Fingerprints of all that a resumed run must find unchanged."""
    files = {"prompts": task.prompts, "negatives": task.negatives}
    weights = {"teacher": task.teacher, "student": task.student}
    return {
        "backbone": task.backbone,
        **{name: sha256(file) for name, file in files.items() if file},
        **{name: fingerprint(*sorted((folder / denoiser.part).glob("*.safetensors"))) for name, folder in weights.items() if folder},
    }


def write_beside(folder: Path, part: str, network: nn.Module, out: Path) -> None:
    """Writes the network as the `part` of `out`, beside all other parts of a diffusers folder: copies, but links to its text encoders."""
    out.mkdir(parents=True, exist_ok=True)
    for other in sorted(folder.iterdir()):
        target = out / other.name
        if other.name == part or not list(other.glob("*.json")) or target.exists():
            continue
        if other.name.startswith("text_encoder"):
            # T5 has 19 GB.
            target.symlink_to(os.path.relpath(other.resolve(), out.resolve()))
        else:
            shutil.copytree(other, target)
    save_diffusers(network, out / part)
