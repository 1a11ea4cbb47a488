"""The settings that every training stage has. Data alone: no torch."""

import math
from dataclasses import dataclass

from snoopi_rt.errors import InputError
from snoopi_rt.request import integer


@dataclass(frozen=True)
class Recipe:
    """Settings that every stage has; each stage adds its own and their defaults. Raises InputError for a value out of range."""

    steps: int
    batch: int
    lr: float
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            integer(name, getattr(self, name), 1)
        integer("seed", self.seed, 0)
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr must be a positive number, got {self.lr}")
