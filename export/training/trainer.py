"""PG-SB from a teacher's folder and a file of prompts to a student's folder."""

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import CLIPModel

from snoopi_rt.errors import InputError
from snoopi_rt.export.backbones import Denoiser, Weights, find_backbone
from snoopi_rt.export.backbones.network import check_network, read_latent
from snoopi_rt.export.presets.preset import written
from snoopi_rt.export.presets.rows import PRESETS
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.distillation import Distillation, own_preset
from snoopi_rt.export.training.edits import check_edits
from snoopi_rt.export.training.processes import Processes
from snoopi_rt.export.training.prompt_files import check_prompts
from snoopi_rt.export.training.recipe import Recipe, described
from snoopi_rt.export.training.schedule import Schedule
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.training.text_states import check_states, states_key
from snoopi_rt.export.weights.checkpoint import read_config
from snoopi_rt.export.weights.files import CONFIG, fingerprint, nothing_if_refused, save_diffusers
from snoopi_rt.export.weights.text_files import check_folder
from snoopi_rt.files import sha256

__all__ = ["Task", "train", "write_beside"]


def train(
    task: Task,
    recipe: Recipe,
    compiled: bool = False,
    sample_every: int = 250,
    say: Callable[[str], object] = lambda text: None,
) -> str:
    """Distils and writes the student to `task.out` in diffusers layout: what export reads; text encoder and decoder are the teacher's.

    Gives the name of the preset that reads it, with its settings, as on the command line of export; `say` is told the settings once all
    is checked. Raises InputError for folders and recipes that do not fit, of which nothing is left behind, OutputError as loop.run does.
    """
    processes = Processes()
    if recipe.batch % processes.count:
        raise InputError(f"a batch of {recipe.batch} cannot be shared among {processes.count} processes")
    denoiser = find_backbone(task.backbone).denoiser()
    schedule = _check(task, recipe, denoiser)
    stage = loop.Stage("student", task.out, recipe, _inputs(task, denoiser), sample_every)
    loop.first_step(stage)

    def ready() -> None:
        if processes.main:
            say(described(recipe))

    with nothing_if_refused(task.states or task.out / "states", task.out / "pictures") if processes.main else nullcontext():
        distillation = Distillation(task, recipe, denoiser, schedule, processes, compiled, ready)
    stage = replace(stage, wrong=distillation.wrong)
    parts = {"student": distillation.weights, "lora": distillation.lora_weights}
    if distillation.discriminator is not None:
        parts["heads"] = distillation.head_weights
    loop.run(stage, parts, lambda i, random: distillation.step(i), distillation.sample, processes)
    if processes.main:
        write_beside(task.teacher, denoiser.part, distillation.finished(), task.out)
    return _preset(distillation)


def _check(task: Task, recipe: Recipe, denoiser: Denoiser) -> Schedule:
    """The teacher's schedule. Raises InputError for all that can be wrong and is seen before weights are loaded or anything is written."""
    check_network(task.teacher, task.backbone, denoiser)
    if task.student is not None:
        check_network(task.student, task.backbone, denoiser)
    if task.clip is not None:
        read_config(check_folder(task.clip) / CONFIG, CLIPModel)
    schedule = Schedule.of(task.teacher)
    read_latent(Weights(task.teacher), denoiser.part)
    task.check(recipe)
    texts = {"prompts": task.prompts, "negatives": task.negatives, "edits-prompt": task.edits}
    for name, file in texts.items():
        if file is not None:
            check = check_edits if file is task.edits else check_prompts
            check(file)
            check_states(task.states_folder(name), states_key(file, task.teacher / "text_encoder"))
    with tempfile.TemporaryDirectory() as folder:
        encoder = denoiser.prompt_encoder(task.teacher, PRESETS[own_preset(task.backbone)].max_tokens)
        encoder.write_tokenizer(Path(folder) / "tokenizer.json")
    return schedule


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
