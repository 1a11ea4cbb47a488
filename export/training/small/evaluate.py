"""What a student of the small domain can do: things, backgrounds and flaws that were asked for, and how near its pictures are to real ones.

A drawer makes pictures (N, 128, 128, 3) uint8 of prompts with their seeds: a bundle's pipeline, or a teacher in many steps.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from snoopi_rt.export.training.small import pixel_metrics
from snoopi_rt.export.training.small.concepts import CONCEPTS, with_article
from snoopi_rt.export.training.small.emoji import BACKGROUNDS, QUALITIES, compose, split_of
from snoopi_rt.export.training.small.scorer import Scorer, Sprites
from snoopi_rt.export.training.small.statistics import frechet, interval, kernel_distance, precision_recall

Drawer = Callable[..., np.ndarray]
"""drawer(prompts, seeds, negative=None, scale=None)"""
MANIFOLD = 2000
"""Pictures of each set whose precision and recall are taken: all pairs of them are compared."""


@dataclass(frozen=True)
class Limits:
    """From which value on each metric says that its flaw is there: where clean and flawed real pictures are told apart best."""

    values: dict[str, float]
    right: dict[str, float]
    """The mean of the shares of flawed and of clean pictures that the limit tells right."""

    @classmethod
    def of(cls, pictures: np.ndarray, qualities: Sequence[str | None]) -> "Limits":
        """Of pictures as a student could draw them, real ones after the autoencoder, and the flaw that each has."""
        values, right = {}, {}
        for flaw, metric in pixel_metrics.FLAWS.items():
            score = metric(pictures)
            flawed, clean = (np.sort(score[[quality == kind for quality in qualities]]) for kind in (flaw, None))
            tried = np.unique(np.concatenate([flawed, clean]))
            # In the middle between two neighbours, so that neither kind's own edge is the limit.
            tried = (tried[1:] + tried[:-1]) / 2
            found = 0.5 * (1 - np.searchsorted(flawed, tried) / len(flawed)) + 0.5 * np.searchsorted(clean, tried) / len(clean)
            values[flaw], right[flaw] = float(tried[found.argmax()]), float(found.max())
        return cls(values, right)

    def shows(self, pictures: np.ndarray, flaw: str) -> np.ndarray:
        """Whether each picture has the flaw, (N,) bool."""
        return pixel_metrics.FLAWS[flaw](pictures) >= self.values[flaw]


def compositions(split: str) -> Iterator[tuple[str, str]]:
    """Pairs of thing and background of one split without end, each as often as the others."""
    pairs = [(concept.name, colour) for concept in CONCEPTS for colour in BACKGROUNDS if split_of(concept.name, colour) == split]
    order = np.random.RandomState(0)
    while True:
        yield from (pairs[i] for i in order.permutation(len(pairs)))


def plain(name: str, colour: str, flaw: str | None = None) -> str:
    """The caption of a thing on a background, with a flaw or without. A grayscale one has no colour: no caption of training has both."""
    words = f"a {flaw} {name}" if flaw else with_article(name)
    return words if flaw == "grayscale" else f"{words} on {with_article(colour)} background"


def real_pictures(sprites: Sprites, count: int, seed: int) -> tuple[np.ndarray, list[str], list[str | None]]:
    """Pictures of the test split with their captions and flaws."""
    rows = [compose(sprites, np.random.default_rng([seed, i]), split="test") for i in range(count)]
    return np.stack([picture for _, picture in rows]), [row.caption for row, _ in rows], [row.facts.quality for row, _ in rows]


def asked(drawer: Drawer, scorers: Sequence[Scorer], limits: Limits, count: int, skip: int = 0) -> dict[str, Any]:
    """The shares of held-out captions whose thing, background and flaw are there, each with its 95 % interval.

    `skip`: so many captions and seeds come before these.
    """
    pairs = list(islice(compositions("test"), skip, skip + count))
    pictures = drawer([plain(*pair) for pair in pairs], list(range(skip, skip + count)))
    names, colours = [name for name, _ in pairs], [colour for _, colour in pairs]
    judged = {scorer.kind.name: scorer.right(pictures, names) for scorer in scorers}
    document: dict[str, Any] = {f"thing, scorer {name}": share(right) for name, right in judged.items()}
    first, second = judged.values()
    document["scorers agree"] = share(first == second)
    document["background"] = share(np.array(pixel_metrics.background(pictures)) == np.array(colours))
    for flaw in QUALITIES:
        wanted = pairs[: count // len(QUALITIES) or 1]
        flawed = drawer([plain(*pair, flaw) for pair in wanted], list(range(skip, skip + len(wanted))))
        document[flaw] = share(limits.shows(flawed, flaw))
    return document


def nearness(made: np.ndarray, real: np.ndarray, other: np.ndarray, scorers: Sequence[Scorer]) -> dict[str, Any]:
    """How far made pictures are from real ones in each scorer's features; `other` real ones say how far real is from real."""
    document: dict[str, Any] = {}
    for scorer in scorers:
        features = [scorer(pictures)[0] for pictures in (made, real, other)]
        precision, recall = precision_recall(features[1][:MANIFOLD], features[0][:MANIFOLD])
        document[f"scorer {scorer.kind.name}"] = {
            "frechet": frechet(features[0], features[1]),
            "frechet of real": frechet(features[2], features[1]),
            "kid": kernel_distance(features[0], features[1]),
            "kid of real": kernel_distance(features[2], features[1]),
            "precision": precision,
            "recall": recall,
        }
    return document


def share(right: np.ndarray) -> dict[str, Any]:
    """A share with what it is of and its 95 % interval."""
    return {"share": float(np.mean(right)) if len(right) else 0.0, "of": len(right), "interval": interval(int(np.sum(right)), len(right))}
