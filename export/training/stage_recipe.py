"""The settings that every training stage has. Data alone: no torch."""

import math
from dataclasses import dataclass

from snoopi_rt.errors import InputError
from snoopi_rt.export.settings import check_choices
from snoopi_rt.request import check_seed, integer


@dataclass(frozen=True)
class StageRecipe:
    """Settings of every stage; each stage adds its own and gives defaults. Raises InputError for a value out of range."""

    steps: int
    """Optimiser steps of the whole run."""
    batch: int
    """Samples per step, over all processes."""
    lr: float
    """Peak learning rate."""
    seed: int = 0
    """The same seed gives the same run."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("steps", "batch"):
            integer(name, getattr(self, name), 1)
        check_seed(self.seed)
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr must be a positive number, got {self.lr}")
