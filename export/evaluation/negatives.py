"""Negative prompts of any student: what they remove, what stays, and what they do to images that never showed it.

A zero-shot CLIP classifier says whether an image shows the unwanted thing: it is nearer to the pair's caption `shows` than to `lacks`.
How often that is wrong is measured on labelled images, if there are any.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from snoopi_rt.errors import InputError
from snoopi_rt.export.evaluation import pixel_metrics
from snoopi_rt.export.evaluation.context import Context
from snoopi_rt.export.evaluation.harm import Harm, Seen
from snoopi_rt.export.evaluation.image_sets import ImageSet, PromptRow, make_images
from snoopi_rt.export.evaluation.report import Goal, ReportRow, mean, share
from snoopi_rt.export.evaluation.samplers import Sampler
from snoopi_rt.export.evaluation.statistics import share_interval, spread

CLASSIFIER = "clip-b32"
LABELS = "labels.jsonl"
OTHERS = 1_000_000
"""Added to the seeds of images whose distribution the others' is compared with."""


@dataclass(frozen=True)
class Pair:
    """A prompt, what is unwanted in it (the negative prompt) and wanted instead, and the classifier's captions with and without it."""

    prompt: str
    unwanted: str
    wanted: str
    shows: str
    lacks: str
    set: str = ""


@dataclass(frozen=True)
class Label:
    """An image of which it is known whether it shows a pair's unwanted thing."""

    file: Path
    pair: Pair
    shown: bool


def read_pairs(path: Path | None = None, limit: int | None = None) -> list[Pair]:
    """The pairs of a file of JSON lines, by default the paper's six and fifty of everyday use.

    Raises InputError for another line, and if a pair has no other whose negative is unrelated to it.
    """
    source = path or files(__package__).joinpath("negative_pairs.jsonl")
    pairs = []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
        try:
            pairs.append(Pair(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(f"line {number} of {path or 'the pairs'} is not a pair: {error}") from error
    if not pairs:
        raise InputError(f"{path} holds no pair")
    pairs = spread(pairs, limit)
    unrelated(pairs)
    return pairs


def unrelated(pairs: Sequence[Pair]) -> list[str]:
    """For each pair what is unwanted in another one: the first, from half the list further on, that differs in prompt and unwanted thing.

    Raises InputError if there is none.
    """
    chosen = []
    for i, pair in enumerate(pairs):
        further = (pairs[(i + len(pairs) // 2 + step) % len(pairs)] for step in range(len(pairs)))
        other = next((other for other in further if other.prompt != pair.prompt and other.unwanted != pair.unwanted), None)
        if other is None:
            raise InputError(
                f"pair {pair.prompt!r}, {pair.unwanted!r} has no unrelated one: "
                "at least two pairs with different prompts and unwanted things are needed"
            )
        chosen.append(other.unwanted)
    return chosen


@dataclass(frozen=True)
class Effect:
    """Images before and after a negative, (N,) arrays each, of the same prompts and seeds.

    shown_*: whether the unwanted thing is there; kept_*: whether the own prompt is the nearest of all; plus_*, minus_*: cosines with prompt
    and negative; distance: one minus the cosine of the features; levels: mean absolute difference; seams_*: see pixel_metrics.
    """

    shown_before: np.ndarray
    shown_after: np.ndarray
    kept_before: np.ndarray
    kept_after: np.ndarray
    plus_before: np.ndarray
    plus_after: np.ndarray
    minus_before: np.ndarray
    minus_after: np.ndarray
    distance: np.ndarray
    levels: np.ndarray
    seams_before: np.ndarray
    seams_after: np.ndarray
    features_before: np.ndarray
    features_after: np.ndarray

    def of(self, rows: np.ndarray) -> "Effect":
        """Some of the images, by a mask (N,)."""
        return Effect(**{name: value[rows] for name, value in vars(self).items()})


@dataclass(frozen=True)
class Trial:
    """One scale: the effect of each prompt's own negative, and of another pair's, which names nothing of the image.

    others: features of images of the same prompts without a negative, with other seeds.
    """

    scale: float
    own: Effect
    unrelated: Effect
    others: np.ndarray

    def of(self, rows: np.ndarray) -> "Trial":
        return Trial(self.scale, self.own.of(rows), self.unrelated.of(rows), self.others[rows])

    @property
    def removed(self) -> float:
        """The share without the unwanted thing, of the images that showed it; 0 if none did."""
        gone = ~self.own.shown_after[self.own.shown_before]
        return float(gone.mean()) if len(gone) else 0.0

    @property
    def kept(self) -> float:
        """The share of prompts recognised under their own negative, relative to that without one; 0 if none was."""
        before = self.own.kept_before.mean()
        return float(self.own.kept_after.mean() / before) if before else 0.0

    @property
    def harmless(self) -> bool:
        return all(row.met is not False for row in harm("", self.unrelated, self.others))


class Trials:
    """A sampler's images of the pairs without a negative and at several scales, several seeds of each."""

    def __init__(self, name: str, sampler: Sampler, pairs: Sequence[Pair], seeds: int, context: Context, folder: Path) -> None:
        self._name, self._sampler, self._context, self._folder = name, sampler, context, folder
        self.pairs = [pair for pair in pairs for _ in range(seeds)]
        self._unrelated = [unwanted for unwanted in unrelated(pairs) for _ in range(seeds)]
        self.plain = self._images("plain", [None] * len(self.pairs))
        self._others = context.image_features(CLASSIFIER, self._images("others", [None] * len(self.pairs), seed=OTHERS))
        prompts = list(dict.fromkeys(pair.prompt for pair in self.pairs))
        self._own = np.array([prompts.index(pair.prompt) for pair in self.pairs])
        self._prompts = context.text_features(CLASSIFIER, prompts)

    def at(self, scale: float) -> tuple[Trial, ImageSet]:
        """The effects at a scale, and the images under their own negatives."""
        unwanted = [pair.unwanted for pair in self.pairs]
        own, unrelated = (
            self._images(f"{kind}-{scale:g}", negatives, scale) for kind, negatives in (("own", unwanted), ("unrelated", self._unrelated))
        )
        return Trial(scale, self._effect(own, unwanted), self._effect(unrelated, self._unrelated), self._others), own

    def _images(self, kind: str, negatives: Sequence[str | None], scale: float | None = None, seed: int = 0) -> ImageSet:
        rows = [PromptRow(pair.prompt, negative) for pair, negative in zip(self.pairs, negatives, strict=True)]
        return make_images(f"{self._name}, {kind}", self._sampler, rows, self._folder / kind, seed, scale)

    def _effect(self, after: ImageSet, negatives: Sequence[str]) -> Effect:
        pictures = (self.plain, after)
        features = [self._context.image_features(CLASSIFIER, images) for images in pictures]
        shows, lacks = (
            self._context.text_features(CLASSIFIER, [getattr(pair, name) for pair in self.pairs]) for name in ("shows", "lacks")
        )
        minus = self._context.text_features(CLASSIFIER, list(negatives))
        plus = self._prompts[self._own]
        shown = [(rows * shows).sum(1) > (rows * lacks).sum(1) for rows in features]
        kept = [(rows @ self._prompts.T).argmax(1) == self._own for rows in features]
        levels, seams = [], []
        for one, other in zip(*(images.pictures() for images in pictures), strict=True):
            levels.append(np.abs(one.astype(np.int16) - other).mean())
            both = pixel_metrics.seams(np.stack([one, other]), self._sampler.cell)
            seams.append([[part[i] for part in both] for i in (0, 1)])
        before, later = np.moveaxis(np.array(seams), 1, 0)
        return Effect(
            shown_before=shown[0],
            shown_after=shown[1],
            kept_before=kept[0],
            kept_after=kept[1],
            plus_before=(features[0] * plus).sum(1),
            plus_after=(features[1] * plus).sum(1),
            minus_before=(features[0] * minus).sum(1),
            minus_after=(features[1] * minus).sum(1),
            distance=1 - (features[0] * features[1]).sum(1),
            levels=np.array(levels),
            seams_before=before,
            seams_after=later,
            features_before=features[0],
            features_after=features[1],
        )


def figures(trial: Trial, error: float | None = None) -> Iterator[ReportRow]:
    """The rows of one scale. error: how often the classifier is wrong, if that was measured."""
    section, own = f"negatives, scale {trial.scale:g}", trial.own
    yield share(section, "without the unwanted thing, no negative", ~own.shown_before, error=error)
    yield share(section, "without the unwanted thing", ~own.shown_after, error=error)
    yield share(section, "removed, of pictures that showed it", ~own.shown_after[own.shown_before], error=error)
    yield share(section, "prompt recognised, no negative", own.kept_before)
    yield share(section, "prompt recognised", own.kept_after)
    yield mean(section, "CLIP+ gained", own.plus_after - own.plus_before, "cosine")
    yield mean(section, "CLIP- gained", own.minus_after - own.minus_before, "cosine")
    yield mean(section, "collateral change", own.distance, "feature distance")
    yield mean(section, "collateral change", own.levels, "levels")
    clean = list(harm(section, trial.unrelated, trial.others))
    yield from clean
    met = sum(row.met is not False for row in clean)
    goals = sum(row.goal is not None for row in clean)
    verdict = "pictures that do not show it are no worse"
    yield ReportRow(
        section, verdict, float(met == len(clean)), Goal(least=1), "yes or no", detail={"goals met": goals - (len(clean) - met)}
    )


def harm(section: str, effect: Effect, others: np.ndarray) -> Iterator[ReportRow]:
    """What a negative that names nothing of the images makes of them: none of it may be worse."""
    label = "unrelated negative"
    yield mean(section, f"{label}, change", effect.distance, "feature distance")
    plain = Seen(effect.kept_before, effect.features_before, *effect.seams_before.T)
    after = Seen(effect.kept_after, effect.features_after, *effect.seams_after.T)
    yield from Harm(plain, others).rows(section, label, after, Goal(least=-1))


def choose(trials: Sequence[Trial], half: np.ndarray) -> float | None:
    """The scale that removes most on a half of the images among those that harm none of them; the smaller of equals; None: all harm."""
    harmless = [trial.of(half) for trial in trials if trial.of(half).harmless]
    return min(harmless, key=lambda trial: (-trial.removed, trial.scale)).scale if harmless else None


def read_labels(folder: Path, pairs: Sequence[Pair]) -> list[Label]:
    """Labelled images: FOLDER/labels.jsonl has a file, a prompt, what is unwanted and whether it is shown in each line.

    Raises InputError for another form and for a pair that is not among them.
    """
    known = {(pair.prompt, pair.unwanted): pair for pair in pairs}
    labels = []
    path = folder / LABELS
    if not path.is_file():
        raise InputError(f"there is no {LABELS} in {folder}")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            labels.append(Label(folder / row["file"], known[row["prompt"], row["unwanted"]], bool(row["shown"])))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"line {number} of {path} is not a label of one of the pairs: {error!r}") from error
    return labels


def classifier_error(labels: Sequence[Label], context: Context) -> ReportRow:
    """How often the classifier is wrong on labelled images."""
    images = ImageSet("labelled", tuple(label.file for label in labels))
    features = context.image_features(CLASSIFIER, images)
    shows, lacks = (context.text_features(CLASSIFIER, [getattr(label.pair, name) for label in labels]) for name in ("shows", "lacks"))
    wrong = ((features * shows).sum(1) > (features * lacks).sum(1)) != np.array([label.shown for label in labels])
    count, of = int(wrong.sum()), len(labels)
    return ReportRow("negatives", "the classifier's error", count / of, count=count, of=of, interval=share_interval(count, of))
