"""What a negative prompt should do to a prompt's picture, as another prompt tells it (see training/edits.py for the file).

With the negative prompt the student learns to draw, from the same noise, what it draws of the wanted prompt without one. Its own pictures
are as sharp as it is, and follow it while it learns; the other losses keep them good. A student that is good already can learn edits alone,
from the pictures that it drew when it began (`anchored`). No image is needed.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from snoopi_rt.errors import InputError
from snoopi_rt.export.training.edits import Edit, check_edits, read_edits
from snoopi_rt.export.training.loop import random_stream
from snoopi_rt.export.training.losses.loss import Loss, Term
from snoopi_rt.export.training.recipe import Edits, LossSettings, StudentRecipe
from snoopi_rt.export.training.run import Run, StudentBatch
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.training.text_states import either

PLAIN = 0.5
"""Share of anchored edits that are drawn without their negative, which must change nothing: the student's pictures as they were."""


class EditsLoss(Loss):
    """Edits that change the picture are learned at the largest negative scale; all others must hold at every scale."""

    Settings = Edits
    settings: Edits

    def __init__(self, run: Run, settings: Edits):
        super().__init__(run, settings)
        file = run.task.edits
        assert file is not None  # see `check`
        with run.prepared():
            self._prompts, self._negatives, self._wanted_prompts = (
                run.prompts.encode(file, partial(_texts, file, text_of), name)
                for name, text_of in (
                    ("edits-prompt", lambda edit: edit.prompt),
                    ("edits-negative", lambda edit: edit.negative),
                    ("edits-wanted", lambda edit: edit.wanted_prompt),
                )
            )
        self._changes = torch.tensor([edit.changes for edit in read_edits(file)])
        self._first = run.models.first_student() if settings.anchored else None

    @classmethod
    def check(cls, settings: LossSettings, task: Task, recipe: StudentRecipe) -> None:
        if (settings.weight > 0) != (task.edits is not None):
            raise InputError(f"edits need both: {'--set edits.weight=1' if task.edits else 'a file of them (--edits)'} is missing")
        if task.edits is not None:
            check_edits(task.edits)
            task.check_states(task.edits, "edits-prompt")

    def term(self, batch: StudentBatch) -> Term:
        recipe, models, samples = self.run.recipe, self.run.models, batch.samples
        rows = self.run.rows(samples, len(self._changes))
        streams = [random_stream(recipe.seed, samples.step, number, "edit") for number in samples.numbers]
        noise = torch.stack([torch.randn(*models.shape, generator=stream) for stream in streams]).to(models.device)
        changes = self._changes[rows].to(models.device)
        share = torch.stack([torch.rand((), generator=stream) for stream in streams]).to(models.device)
        prompts, wanted = self._prompts.batch(rows), self._wanted_prompts.batch(rows)
        if self._first is not None:
            plain = share < PLAIN
            share = ((share - PLAIN) / (1 - PLAIN)).clamp(min=0)
            wanted = either(plain, prompts, wanted)
            changes = changes & ~plain
        with torch.no_grad():
            target = models.clean(noise, wanted, network=self._first)
        scale = recipe.negative_scale_max * torch.where(changes, 1.0, share)
        x0 = models.clean(noise, prompts, (self._negatives.batch(rows), scale))
        distance = (x0 - target).square().mean((1, 2, 3))
        logged = {name: (distance * chosen).sum() / chosen.sum().clamp(min=1) for name, chosen in (("heeded", changes), ("kept", ~changes))}
        return Term(x0, (distance * torch.where(changes, 1.0, self.settings.kept)).mean(), logged)


def _texts(file: Path, text_of: Callable[[Edit], str]) -> Iterator[str]:
    return map(text_of, read_edits(file))
