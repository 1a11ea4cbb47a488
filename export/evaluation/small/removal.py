"""What was asked for and is not wanted after all: flaws, backgrounds, one of two things and colours must go, and the rest stay."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from snoopi_rt.export.evaluation.report import Goal, ReportRow, mean, share
from snoopi_rt.export.evaluation.samplers import Sampler
from snoopi_rt.export.evaluation.small.attributes import pairs
from snoopi_rt.export.evaluation.small.counters import Counters, colours_of
from snoopi_rt.export.evaluation.small.domain import varied_background
from snoopi_rt.export.evaluation.small.judge import cosine_distance
from snoopi_rt.export.small_model.dataset.scene import Scene, plain_caption
from snoopi_rt.export.small_model.dataset.vocabulary import COLOURS, DEFAULT_BACKGROUND, FLAWS, with_article

SECTION = "negatives of what was asked for"


def removal(sampler: Sampler, counters: Counters) -> Iterator[ReportRow]:
    """Shares of images that show what was asked for, and of those the shares that do not under its negative."""
    for flaw in FLAWS:
        yield from _flaw(sampler, counters, flaw)
    yield from _backgrounds(sampler, counters)
    yield from _one_of_two(sampler, counters)
    yield from _colours(sampler, counters)


def _flaw(sampler: Sampler, counters: Counters, flaw: str) -> Iterator[ReportRow]:
    coloured = flaw != "grayscale"
    scenes = [Scene((name,), background=varied_background(i) if coloured else None, flaw=flaw) for i, name in enumerate(counters.common)]
    # Without those that would seem to have it as they should be: a panda is gray.
    clean = counters.domain.real([replace(scene, flaw=None) for scene in scenes], 128)
    scenes = [scene for scene, has in zip(scenes, counters.flaw(clean, scenes), strict=True) if not has]
    pictures = _draw(sampler, scenes)
    shown = np.flatnonzero(counters.flaw(pictures, scenes))
    error = counters.domain.limits(pictures.shape[1]).errors[flaw]
    yield share(SECTION, f"{flaw}: shown when asked for", _places(shown, len(scenes)), 0.90, error=error)
    rest = [scenes[i] for i in shown]
    after = _draw(sampler, rest, shown, [flaw] * len(rest))
    without = _draw(sampler, [replace(scene, flaw=None) for scene in rest], shown)
    gone = ~counters.flaw(after, rest) if rest else np.zeros(0, bool)
    yield share(SECTION, f"{flaw}: gone", gone, 0.90, error=error)
    features = counters.domain.judge.features
    apart = cosine_distance(features(after), features(without))
    # Beside it the distance of images of one scene: nothing can be nearer than chance lets them be.
    real = [counters.domain.real([replace(scene, flaw=None) for scene in rest], pictures.shape[1], seed) for seed in (1, 2)] if rest else []
    chance = float(cosine_distance(*map(features, real)).mean()) if real else None
    yield mean(SECTION, f"{flaw}: to the picture that never had it", apart, "cosine distance", Goal(most=0.08), real_pictures=chance)


def _backgrounds(sampler: Sampler, counters: Counters) -> Iterator[ReportRow]:
    colours = [colour for colour in COLOURS if colour != DEFAULT_BACKGROUND]
    scenes = [Scene((name,), background=colours[(i + k) % len(colours)]) for i, name in enumerate(counters.common) for k in (0, 5)]
    pictures = _draw(sampler, scenes)
    error = float(1 - counters.background(counters.domain.real(scenes, pictures.shape[1]), scenes).mean())
    shown = np.flatnonzero(counters.background(pictures, scenes))
    yield share(SECTION, "background: shown when asked for", _places(shown, len(scenes)), error=error)
    rest = [scenes[i] for i in shown]
    after = _draw(sampler, rest, shown, [f"{scene.background} background" for scene in rest])
    gone = ~counters.background(after, rest) if rest else np.zeros(0, bool)
    yield share(SECTION, "background: gone", gone, 0.95, error=error)
    kept = _kept(counters, pictures[shown], after, rest, [replace(scene, background=None) for scene in rest])
    yield share(SECTION, "background: thing still recognised, of those recognised before", kept)


def _one_of_two(sampler: Sampler, counters: Counters) -> Iterator[ReportRow]:
    scenes = pairs(counters.common, 2)
    unwanted = [i % 2 for i in range(len(scenes))]
    # Both, the wanted one alone, the unwanted one alone.
    choices = [[scene, Scene((scene.things[1 - out],)), Scene((scene.things[out],))] for scene, out in zip(scenes, unwanted, strict=True)]
    pictures = _draw(sampler, scenes)
    side = pictures.shape[1]
    wrong = [counters.nearest(counters.domain.real([choice[k] for choice in choices], side), choices) != k for k in (0, 1)]
    error = float(np.mean(wrong))
    shown = np.flatnonzero(counters.nearest(pictures, choices) == 0)
    yield share(SECTION, "one of two: both shown when asked for", _places(shown, len(scenes)), error=error)
    rest, few = [scenes[i] for i in shown], [choices[i] for i in shown]
    after = _draw(sampler, rest, shown, [with_article(scenes[i].things[unwanted[i]]) for i in shown])
    gone = np.flatnonzero(counters.nearest(after, few) == 1)
    yield share(SECTION, "one of two: gone", _places(gone, len(rest)), 0.85, error=error)
    left = [few[i][1] for i in gone]
    seen = counters.thing(after[gone], left)
    ceiling = float(counters.thing(counters.domain.real(left, side), left).mean()) if left else None
    yield share(SECTION, "one of two: the other recognised, of those gone", seen, 0.85, ceiling)


def _colours(sampler: Sampler, counters: Counters) -> Iterator[ReportRow]:
    colours = list(COLOURS)
    scenes = [Scene((name,), colour=colours[i % len(colours)]) for i, name in enumerate(counters.colourable)]
    own = counters.nearest(counters.domain.real([Scene(scene.things) for scene in scenes], 128), list(map(colours_of, scenes)))
    # Not a red apple, which stays as it is.
    scenes = [scene for scene, place in zip(scenes, own, strict=True) if colours_of(scene)[place] != scene]
    pictures = _draw(sampler, scenes)
    shown = np.flatnonzero(counters.colour(pictures, scenes))
    real = counters.colour(counters.domain.real(scenes, pictures.shape[1]), scenes)
    yield share(SECTION, "colour of a thing: shown when asked for", _places(shown, len(scenes)), error=float(1 - real.mean()))
    rest = [scenes[i] for i in shown]
    after = _draw(sampler, rest, shown, [str(scene.colour) for scene in rest])
    gone = counters.nearest(after, list(map(colours_of, rest))) != [colours_of(scene).index(scene) for scene in rest]
    yield share(SECTION, "colour of a thing: gone", gone)


def _draw(sampler: Sampler, scenes: list[Scene], seeds: np.ndarray | None = None, negatives: list[str] | None = None) -> np.ndarray:
    """Images of the scenes; each keeps its seed if only some are drawn again."""
    numbers = list(range(len(scenes))) if seeds is None else seeds.tolist()
    if not scenes:
        return np.zeros((0, 32, 32, 3), np.uint8)
    return sampler([plain_caption(scene) for scene in scenes], numbers, negatives)


def _kept(counters: Counters, before: np.ndarray, after: np.ndarray, scenes: list[Scene], without: list[Scene]) -> np.ndarray:
    """Whether the thing is recognised in the second image, of the images in which it was in the first."""
    if not scenes:
        return np.zeros(0, bool)
    return counters.thing(after, without)[counters.thing(before, scenes)]


def _places(rows: np.ndarray, count: int) -> np.ndarray:
    right = np.zeros(count, bool)
    right[rows] = True
    return right
