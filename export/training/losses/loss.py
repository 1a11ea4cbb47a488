"""What a loss of the student is: the base class that every file beside this one extends."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from snoopi_rt.export.training.optimise import MasterWeights
from snoopi_rt.export.training.recipe import LossSettings, StudentRecipe
from snoopi_rt.export.training.run import Log, Run, Samples, StudentBatch
from snoopi_rt.export.training.task import Task


@dataclass(frozen=True)
class Term:
    """A loss of some samples."""

    x0: Tensor
    """The student's clean latents (B, C, h, w) that the loss has looked at."""
    value: Tensor
    """The scalar to minimise, a mean over the samples."""
    logged: dict[str, Tensor] = field(default_factory=dict)
    """Scalars for the log."""


class Loss:
    """One term of the student's loss: define `term`, and if needed the rest. Made once per run, if it `is_used`.

    `trained`: master weights of networks that the loss trains itself, by their name in checkpoints.
    """

    Settings: ClassVar[type[LossSettings]] = LossSettings
    """Its settings in the recipe, `NAME.weight` and its own."""

    def __init__(self, run: Run, settings: LossSettings):
        self.run, self.settings = run, settings
        self.trained: dict[str, MasterWeights] = {}

    @classmethod
    def is_used(cls, settings: LossSettings) -> bool:
        """Whether a run with these settings has this loss."""
        return settings.weight > 0

    @classmethod
    def check(cls, settings: LossSettings, task: Task, recipe: StudentRecipe) -> None:
        """Raises InputError for a run that cannot be, before anything is loaded or written. Also called for a loss that is not used."""

    def weight(self, step: int) -> float:
        """The weight of the loss in this step; 0 leaves it out."""
        return 0.0 if step < self.run.regression.warmup_steps else self.settings.weight

    def term(self, batch: StudentBatch) -> Term:
        """The loss of some samples. `batch.x0` is what the student draws of them, shared by all losses that ask for it."""
        raise NotImplementedError

    def follow(self, step: int, drawn: Mapping[Samples, Tensor], log: Log) -> None:
        """Trains the loss's own networks after the student's step; `drawn`: the detached x0 of its terms in this step."""
