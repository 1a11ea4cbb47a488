"""What a negative prompt that names nothing of the images makes of them: none of it may be worse than without one."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from snoopi_rt.export.evaluation.report import Goal, ReportRow, by_prompt, mean
from snoopi_rt.export.evaluation.statistics import Gaussian, relative_interval

UNIT = "of no negative's"


@dataclass(frozen=True)
class Seen:
    """What is compared of images. recognised: whether each shows its prompt, (N,); features (N, D); across, beside: the energies of
    pixel_metrics.seams, (N,)."""

    recognised: np.ndarray
    features: np.ndarray
    across: np.ndarray
    beside: np.ndarray

    @property
    def blockiness(self) -> float:
        return float(self.across.sum() / self.beside.sum())


@dataclass(frozen=True)
class Harm:
    """What images are compared with: the same ones without a negative, and the features of those that theirs should be distributed as.

    rounds: how often all prompts come, one round after another. Images of one prompt are not independent, so intervals are over prompts.
    """

    plain: Seen
    reference: np.ndarray
    rounds: int = 1

    def rows(self, section: str, label: str, seen: Seen, recognition: Goal) -> Iterator[ReportRow]:
        """Recognition, Frechet distance and blockiness of the images under the negative. recognition: the goal in points."""
        count = len(seen.recognised)
        gained = seen.recognised.astype(float) - self.plain.recognised
        yield mean(section, f"{label}, recognition gained", 100 * gained, "points", recognition, rounds=self.rounds)
        if count > 1:
            distance = Gaussian.of(seen.features).distance(self._reference)
            yield ReportRow(section, f"{label}, Frechet distance", _relative(distance, self._distance), Goal(most=1.03), UNIT, of=count)
        ratio = _relative(seen.blockiness, self.plain.blockiness)
        interval = relative_interval(self._energies(seen), self._energies(self.plain)) if self.plain.blockiness else None
        yield ReportRow(section, f"{label}, blockiness", ratio, Goal(most=1), UNIT, of=count, interval=interval)

    def _energies(self, seen: Seen) -> tuple[np.ndarray, np.ndarray]:
        return by_prompt(seen.across, self.rounds), by_prompt(seen.beside, self.rounds)

    @cached_property
    def _reference(self) -> Gaussian:
        return Gaussian.of(self.reference)

    @cached_property
    def _distance(self) -> float:
        return Gaussian.of(self.plain.features).distance(self._reference)


def _relative(value: float, plain: float) -> float:
    return float(value / plain) if plain else float("inf")
