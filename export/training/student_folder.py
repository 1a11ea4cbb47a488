"""A student's folder in diffusers layout, and the preset by which export reads it."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from snoopi_rt.export.one_step import OneStepRule
from snoopi_rt.export.presets.preset import Preset, written
from snoopi_rt.export.presets.rows import PRESETS
from snoopi_rt.export.training.recipe import StudentRecipe
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.weights.files import save_diffusers


def write_student(folder: Path, part: str, network: nn.Module, out: Path) -> None:
    """Writes the network as the `part` of `out`, beside copies of all other parts of a diffusers folder, and links to its text encoders."""
    out.mkdir(parents=True, exist_ok=True)
    for other in sorted(folder.iterdir()):
        target, beside = out / other.name, out / f".{other.name}.part"
        if other.name == part or target.exists() or not (other.name == "model_index.json" or list(other.glob("*.json"))):
            continue
        if other.is_file():
            shutil.copyfile(other, beside)
            beside.replace(target)
        elif other.name.startswith("text_encoder"):
            # T5 takes 19 GB.
            target.unlink(missing_ok=True)
            target.symlink_to(os.path.relpath(other.resolve(), out.resolve()))
        else:
            shutil.rmtree(beside, ignore_errors=True)
            shutil.copytree(other, beside)
            beside.rename(target)
    save_diffusers(network, out / part)


def own_preset(backbone: str) -> Preset:
    """The preset of the students of a backbone that are trained here."""
    return PRESETS[backbone if backbone in PRESETS else f"pgsb-{backbone}"]


def export_arguments(task: Task, recipe: StudentRecipe, rule: OneStepRule, size: tuple[int, int]) -> str:
    """The preset by which export reads the student, a --set for each setting in which the student differs from it, and the guidance with
    which it was trained if that is another."""
    preset = own_preset(task.backbone)
    trained = {"timestep": rule.timestep, "prediction": rule.prediction, "alpha": rule.alpha, "sigma": rule.sigma, "size": size[0]}
    defaults = {name: getattr(preset.rule if hasattr(preset.rule, name) else preset, name) for name in trained}
    settings = [f"--set {name}={written(value)}" for name, value in trained.items() if not _same(value, defaults[name])]
    guidance = recipe.negative_scale_max > 0 and recipe.negative_kind != preset.negative_kind
    return " ".join([preset.name, *settings, *([f"--guidance {recipe.negative_kind}"] if guidance else [])])


def _same(one: Any, other: Any) -> bool:
    return one == other if isinstance(one, str) else math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-6)
