"""The small domain as it is judged: its things, composed real pictures of them, and the limits that tell flawed from clean."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from torch import Tensor

from snoopi_rt.export.evaluation import pixel_metrics
from snoopi_rt.export.evaluation.judge import Judge
from snoopi_rt.export.evaluation.threads import in_threads
from snoopi_rt.export.small_model.dataset.scene import DEFAULT_STYLE, Scene, Vocabulary
from snoopi_rt.export.small_model.dataset.vocabulary import COLOURS, FLAWS, things, without_article

NEARLY = 0.03  # of all pictures, half clean and half flawed
SEEN = 1 / 3  # of the way from clean to flawed


@dataclass(frozen=True)
class FlawThresholds:
    """From which value on each metric says that its flaw is there: between clean and flawed real pictures, where they are told apart
    nearly best, but nearer to the clean ones. Students' flaws are not as pure as composed ones, and are seen all the same."""

    values: dict[str, float]
    errors: dict[str, float]
    """The mean of the shares of flawed and of clean pictures that the limit tells wrong."""

    @classmethod
    def of(cls, pictures: np.ndarray, flaws: Sequence[str | None]) -> "FlawThresholds":
        """Of real pictures and the flaw that each has; each flaw and None must be among them."""
        values, errors = {}, {}
        for flaw, metric in pixel_metrics.FLAWS.items():
            score = metric(pictures)
            tried = np.unique(score)
            wrong = _wrong(score, flaws, flaw, (tried[1:] + tried[:-1]) / 2)
            good = np.flatnonzero(wrong <= wrong.min() + NEARLY)
            clean, flawed = tried[good[0]], tried[good[-1] + 1]
            values[flaw] = float(clean + SEEN * (flawed - clean))
            errors[flaw] = float(_wrong(score, flaws, flaw, np.array([values[flaw]]))[0])
        return cls(values, errors)

    def shows(self, pictures: np.ndarray, flaw: str) -> np.ndarray:
        """Whether each picture has the flaw, (N,) bool."""
        return pixel_metrics.FLAWS[flaw](pictures) >= self.values[flaw] if len(pictures) else np.zeros(0, bool)


def _wrong(score: np.ndarray, flaws: Sequence[str | None], flaw: str, limits: np.ndarray) -> np.ndarray:
    """The mean of the shares of flawed and of clean pictures that each limit tells wrong."""
    flawed, clean = (np.sort(score[[has == kind for has in flaws]]) for kind in (flaw, None))
    return 0.5 * np.searchsorted(flawed, limits) / len(flawed) + 0.5 * (1 - np.searchsorted(clean, limits) / len(clean))


class Domain:
    """The things that a judge knows, and real pictures of them at any size.

    limiting: clean pictures, and as many of each flaw, by which the limits are set.
    """

    def __init__(self, judge: Judge, limiting: int = 100):
        self.judge, self.names, self._limiting = judge, judge.names, limiting
        self._common = {thing.name for thing in things() if thing.common}
        self._limits: dict[int, FlawThresholds] = {}

    @property
    def common(self) -> list[str]:
        """The things that people ask for first."""
        return [name for name in self.names if name in self._common]

    @cached_property
    def colourable(self) -> list[str]:
        """The common things whose colour can be another."""
        able = set(self._colourable)
        return [name for name in self.common if name in able]

    @cached_property
    def _colourable(self) -> list[str]:
        return self.judge.composer.colourable()

    @property
    def countable(self) -> list[str]:
        """The common things of which there can be two."""
        return [name for name in self.common if name not in without_article()]

    def scenes(self, count: int, seed: int) -> list[Scene]:
        """Random scenes, as the training set has them, of what the judge's composer can draw."""
        rng, vocabulary = np.random.default_rng(seed), Vocabulary(self._colourable)
        drawn: list[Scene] = []
        while len(drawn) < count:
            scene = vocabulary.draw_scene(rng)
            if self.can_draw(scene):
                drawn.append(scene)
        return drawn

    def can_draw(self, scene: Scene) -> bool:
        """Whether the judge knows the scene's things, and there are drawings of them in its style."""
        return all(name in self.names and self.judge.composer.has(name, scene.style or DEFAULT_STYLE) for name in scene.things)

    def real(self, scenes: Sequence[Scene], side: int, seed: int = 0) -> np.ndarray:
        """Composed real pictures of the scenes, (N, side, side, 3) uint8."""
        drawn = partial(self._real, scenes, side, seed)
        return np.stack(in_threads(drawn, range(len(scenes)), "real pictures", unit="picture", few=50))

    def real_features(self, scenes: Sequence[Scene], side: int, seed: int = 0) -> Tensor:
        """The judge's features of those pictures, (N, 1280), as Judge.kept keeps them."""
        names = [f"{scene!r} {side} {seed} {i}" for i, scene in enumerate(scenes)]
        return self.judge.kept(names, partial(self._real, scenes, side, seed))

    def _real(self, scenes: Sequence[Scene], side: int, seed: int, i: int) -> np.ndarray:
        return self.judge.composer.draw(scenes[i], np.random.default_rng([seed, i]), side)

    def limits(self, side: int) -> FlawThresholds:
        """The limits for pictures of that size."""
        if side not in self._limits:
            kinds: list[str | None] = [None, *FLAWS]
            # Vivid things: a panda is gray as it is.
            names = self.colourable or self.names
            plain = [Scene((names[i % len(names)],), background=varied_background(i)) for i in range(self._limiting)]
            scenes = [Scene(scene.things, background=scene.background, flaw=flaw) for flaw in kinds for scene in plain]
            self._limits[side] = FlawThresholds.of(self.real(scenes, side, seed=7), [scene.flaw for scene in scenes])
        return self._limits[side]


def varied_background(i: int) -> str | None:
    """Every second picture is white, the others are of all colours in turn."""
    return list(COLOURS)[i // 2 % len(COLOURS)] if i % 2 else None
