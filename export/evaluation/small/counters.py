"""Counters: whether each image shows what its scene has. `counter(pictures, scenes)` gives (N,) bool.

On composed real images a counter is wrong sometimes, too; that is measured beside what it counts.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from PIL import Image

from snoopi_rt.export.evaluation import pixel_metrics
from snoopi_rt.export.evaluation.small.domain import Domain
from snoopi_rt.export.evaluation.small.judge import TOP, ranks
from snoopi_rt.export.evaluation.statistics import spread
from snoopi_rt.export.evaluation.threads import in_threads
from snoopi_rt.export.small_model.dataset.compose import layout
from snoopi_rt.export.small_model.dataset.scene import Scene
from snoopi_rt.export.small_model.dataset.vocabulary import COLOURS, DEFAULT_BACKGROUND

SMALL = 32  # pixels per side at which images are compared with composed ones
NUMBERS = (1, 2, 3)

Counter = Callable[[np.ndarray, Sequence[Scene]], np.ndarray]


class Counters:
    """All counters of a domain. Numbered and coloured things are recognised among so many of the commonest."""

    def __init__(self, domain: Domain, things: int):
        self.domain = domain
        self.common, self.countable, self.colourable = (
            spread(names, things) for names in (domain.common, domain.countable, domain.colourable)
        )
        self.number: Counter = partial(self._variant, numbers_of, self.countable)
        self.colour: Counter = partial(self._variant, colours_of, self.colourable)
        self._composed = lru_cache(None)(self._compose)

    def thing(self, pictures: np.ndarray, scenes: Sequence[Scene]) -> np.ndarray:
        """The scene's one thing is among the judge's first; if a background is named, before white in its place."""
        seen = [pixel_metrics.on_white(picture) if scene.background else picture for picture, scene in zip(pictures, scenes, strict=True)]
        features = self.domain.judge.features(np.stack(seen) if seen else pictures)
        return self.domain.judge.ranks(features, [scene.things[0] for scene in scenes]) < TOP

    def background(self, pictures: np.ndarray, scenes: Sequence[Scene]) -> np.ndarray:
        """The background is of the scene's colour."""
        return np.array(pixel_metrics.background(pictures)) == [scene.background or DEFAULT_BACKGROUND for scene in scenes]

    def flaw(self, pictures: np.ndarray, scenes: Sequence[Scene]) -> np.ndarray:
        """The image has the scene's flaw."""
        right, limits = np.zeros(len(scenes), bool), self.domain.limits(pictures.shape[1])
        for flaw, rows in _grouped(scenes, lambda scene: scene.flaw).items():
            right[rows] = limits.shows(pictures[rows], str(flaw))
        return right

    def both(self, pictures: np.ndarray, scenes: Sequence[Scene]) -> np.ndarray:
        """Each of two things is recognised in a part of its own; which of them is where does not matter."""
        pairs = list(zip(pictures, scenes, strict=True))
        parts = [self.domain.judge.features(np.stack([_part(picture, scene, i) for picture, scene in pairs])) for i in (0, 1)]
        names = [[scene.things[i] for scene in scenes] for i in (0, 1)]
        seen = [[self.domain.judge.ranks(part, things) < TOP for things in names] for part in parts]
        return (seen[0][0] & seen[1][1]) | (seen[0][1] & seen[1][0])

    def nearest(self, pictures: np.ndarray, alternatives: Sequence[Sequence[Scene]]) -> np.ndarray:
        """Which of each image's alternatives, composed, it resembles most in its pixels, (N,) int."""

        def place(i: int) -> int:
            composed = np.stack([self._composed(scene) for scene in alternatives[i]])
            return int(((composed - _reduced(pictures[i])) ** 2).sum((1, 2, 3)).argmin())

        return np.array(in_threads(place, range(len(alternatives))), dtype=int)

    def _variant(
        self, variants: Callable[[Scene], list[Scene]], among: Sequence[str], pictures: np.ndarray, scenes: Sequence[Scene]
    ) -> np.ndarray:
        """The image is nearest to its own scene among the scene's variants, and its one thing recognised among others so varied."""
        choices = [variants(scene) for scene in scenes]
        right = self.nearest(pictures, choices) == [choice.index(scene) for choice, scene in zip(choices, scenes, strict=True)]
        names, features = list(dict.fromkeys([*among, *(scene.things[0] for scene in scenes)])), self.domain.judge.features(pictures)
        for kind, rows in _grouped(scenes, lambda scene: replace(scene, things=())).items():
            references = self.domain.judge.of_scenes([replace(kind, things=(name,)) for name in names])
            own, mean = [names.index(scenes[i].things[0]) for i in rows], references.mean(0)
            right[rows] &= ranks(features[rows] - mean, references - mean, own) < TOP
        return right

    def _compose(self, scene: Scene) -> np.ndarray:
        # By a composer that keeps nothing: drawings in all colours take gigabytes.
        return _reduced(self.domain.judge.composer.forgetful().draw(scene, None, 2 * SMALL))


def numbers_of(scene: Scene) -> list[Scene]:
    """The scene with every number of its thing."""
    return [replace(scene, count=number) for number in NUMBERS]


def colours_of(scene: Scene) -> list[Scene]:
    """The scene with its thing in every colour."""
    return [replace(scene, colour=colour) for colour in COLOURS]


def _grouped(scenes: Sequence[Scene], key: Callable[[Scene], Any]) -> dict[Any, list[int]]:
    """The places of the scenes that have each key."""
    places: defaultdict[Any, list[int]] = defaultdict(list)
    for i, scene in enumerate(scenes):
        places[key(scene)].append(i)
    return places


def _reduced(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((SMALL, SMALL), Image.Resampling.BOX), np.float32)


def _part(picture: np.ndarray, scene: Scene, i: int) -> np.ndarray:
    """The square around the middle of one of two things, half as wide as the image."""
    side = len(picture)
    x, y = (min(max(round(side * (middle - 0.25)), 0), side // 2) for middle in layout(scene)[0][i])
    return picture[y : y + side // 2, x : x + side // 2]
