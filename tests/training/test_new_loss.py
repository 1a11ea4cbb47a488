"""A loss of one's own: one class, registered under a name, without a change to any file of the package."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_students

from snoopi_rt.errors import InputError
from snoopi_rt.export.settings import changed
from snoopi_rt.export.training import losses
from snoopi_rt.export.training.losses.loss import Loss, Term
from snoopi_rt.export.training.recipe import LOSS_SETTINGS, LossSettings, StudentRecipe
from snoopi_rt.export.training.recipes import described
from snoopi_rt.export.training.run import StudentBatch
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.training.trainer import train


@dataclass(frozen=True)
class Contrast(LossSettings):
    """Pictures as contrasty as asked for."""

    deviation: float = 1.0
    """Of the clean latents."""

    def __post_init__(self) -> None:
        if self.deviation <= 0:
            raise InputError("contrast.deviation must be above 0")


class ContrastLoss(Loss):
    """The squared difference between the deviation of the student's latents and the one that is asked for."""

    Settings = Contrast
    settings: Contrast

    def term(self, batch: StudentBatch) -> Term:
        loss = (batch.x0.std() - self.settings.deviation) ** 2
        return Term(batch.x0, loss, {"contrast": loss})


def forget() -> None:
    for known in (losses.LOSSES, LOSS_SETTINGS):
        known.pop("contrast", None)


@pytest.fixture
def registered() -> Iterator[None]:
    losses.register("contrast", ContrastLoss)
    yield
    forget()


@pytest.mark.usefixtures("registered")
def test_a_registered_loss_trains_the_student_and_has_settings_like_any_other(tmp_path: Path) -> None:
    teacher = tiny_students.pixart(tmp_path / "teacher", tiny_vae=True)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    settings = {"steps": 2, "batch": 2, "lora.rank": 2, "collapse": 0.0, "optimiser.warmup": 1}
    recipe = changed(StudentRecipe(), {**settings, "contrast.weight": 0.5, "contrast.deviation": 2.0})
    assert "contrast.deviation" in described(recipe)
    task = Task("pixart", teacher, tmp_path / "prompts.txt", tmp_path / "student")
    train(task, recipe)
    first, second = (json.loads(line) for line in (tmp_path / "student" / "log.jsonl").read_text().splitlines())
    assert first["contrast"] > second["contrast"] > 0 and "vsd" in second
    with pytest.raises(InputError, match=r"contrast\.deviation must be above 0"):
        changed(recipe, {"contrast.deviation": 0.0})
    forget()
    with pytest.raises(InputError, match=r"another recipe \(contrast\.deviation 2\.0 -> not set, contrast\.weight 0\.5 -> not set\)"):
        train(task, changed(StudentRecipe(), settings))
