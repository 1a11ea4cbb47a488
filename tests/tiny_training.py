"""Runs of PG-SB of a second each, on the teachers of tests/training/conftest.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from snoopi_rt.export.backbones import find_backbone
from snoopi_rt.export.settings import changed
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.processes import Processes
from snoopi_rt.export.training.recipe import StudentRecipe
from snoopi_rt.export.training.schedule import Schedule
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.training.trainer import Trainer, train

TINY = {
    "steps": 3,
    "batch": 4,
    "lr": 1e-3,
    "precision": "fp32",
    "collapse": 0.0,
    "lora.rank": 2,
    "lora.alpha": 4,
    "optimiser.warmup": 1,
    "guidance.min": 1.0,
    "guidance.max": 3.0,
}


PARTS = {"pixart": "transformer", "sd15": "unet", "sd21": "unet"}


def tiny(**settings: Any) -> StudentRecipe:
    """The settings of a run of a second, and others by their full names."""
    return changed(StudentRecipe(), TINY | settings)


def distil(root: Path, out: Path, backbone: str = "pixart", files: dict[str, Any] | None = None, **settings: Any) -> list[dict[str, float]]:
    """The scalars of every step."""
    train(Task(backbone, root / backbone, root / "prompts.txt", out, **(files or {})), tiny(**settings))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def trainer_of(root: Path, out: Path, files: dict[str, Any] | None = None, backbone: str = "pixart", **settings: Any) -> Trainer:
    """A run that has not begun."""
    task = Task(backbone, root / backbone, root / "prompts.txt", out, **(files or {}))
    return Trainer(task, tiny(**settings), find_backbone(backbone).denoiser(), Schedule.of(task.teacher), Processes())


def assert_near(one: list[dict[str, float]], other: list[dict[str, float]], tolerance: float = 1e-4) -> None:
    for first, second in zip(one, other, strict=True):
        for name in ("vsd", "lora", "spread"):
            assert first[name] == pytest.approx(second[name], rel=tolerance), (first["step"], name)


def always_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(loop, "SAVE_SHARE", 0)


def weights(folder: Path, backbone: str = "pixart") -> dict[str, torch.Tensor]:
    return load_file(folder / PARTS[backbone] / "diffusion_pytorch_model.safetensors")
