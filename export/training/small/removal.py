"""What a negative prompt does: of pictures that show something unwanted, the share that still shows it, and what of the rest is kept."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from snoopi_rt.export.training.small import pixel_metrics
from snoopi_rt.export.training.small.concepts import with_article
from snoopi_rt.export.training.small.emoji import BACKGROUNDS, NEUTRAL, QUALITIES
from snoopi_rt.export.training.small.evaluate import Drawer, Limits, compositions, plain, share
from snoopi_rt.export.training.small.scorer import NAMES, Scorer

UNRELATED = "a bicycle"
"""The negative against which it is measured what any negative costs; no case asks for it."""
ROUND, RARE = 128, 0.2
HOPELESS = 6000
"""So many pictures without the unwanted thing are looked at and no more."""
Pairs = list[tuple[str, str]]
Kept = dict[str, Callable[[np.ndarray, Pairs], np.ndarray]]
FIRST_SEED = {"tuned": 50_000, "reported": 1_000}
"""The default scale is tuned on seeds that are never reported."""


@dataclass(frozen=True)
class Case:
    """One unwanted thing. prompt(name, colour) asks for it or leaves it to chance; shows: whether it is there, (N,) bool.

    kept(pictures, pairs): whether what shall stay is there, by what it is called.
    """

    negative: str
    asked: bool
    prompt: Callable[[str, str], str]
    shows: Callable[[np.ndarray], np.ndarray]
    kept: Kept
    usable: Callable[[str, str], bool] = lambda name, colour: True


def cases(scorer: Scorer, limits: Limits) -> list[Case]:
    """Flaws, background colours and one thing of two, asked for and, of the first two, unasked."""
    found = [case for flaw in QUALITIES for case in _flaw(flaw, scorer, limits)]
    found += [case for colour in BACKGROUNDS for case in _colour(colour, scorer)]
    return found + [_second_thing(name, scorer) for name in ("dog", "apple", "car", "star")]


def _flaw(flaw: str, scorer: Scorer, limits: Limits) -> list[Case]:
    def ask(name: str, colour: str) -> str:
        return plain(name, colour, flaw)

    def shows(pictures: np.ndarray) -> np.ndarray:
        return limits.shows(pictures, flaw)

    def usable(name: str, colour: str) -> bool:
        # Before a gray background grayscale cannot be told from the picture as it should be.
        return flaw != "grayscale" or colour not in NEUTRAL

    kept: Kept = {"thing": partial(_thing, scorer), "background": _background}
    without_colour: Kept = {"thing": kept["thing"]}
    asked = Case(flaw, True, ask, shows, without_colour if flaw == "grayscale" else kept)
    return [asked, Case(flaw, False, plain, shows, kept, usable)]


def _colour(colour: str, scorer: Scorer) -> list[Case]:
    negative = f"{with_article(colour)} background"
    kept: Kept = {"thing": partial(_thing, scorer)}

    def ask(name: str, other: str) -> str:
        return plain(name, colour)

    def leave_open(name: str, other: str) -> str:
        return with_article(name)

    def shows(pictures: np.ndarray) -> np.ndarray:
        return np.array(pixel_metrics.background(pictures)) == colour

    return [Case(negative, True, ask, shows, kept), Case(negative, False, leave_open, shows, kept)]


def _second_thing(other: str, scorer: Scorer) -> Case:
    """A thing is seen in its own half, or in the whole picture, where one that is alone has its place."""

    def ask(name: str, colour: str) -> str:
        return f"{with_article(name)} and {with_article(other)} on {with_article(colour)} background"

    def shows(pictures: np.ndarray) -> np.ndarray:
        return np.any([scorer(part)[1] == NAMES.index(other) for part in (pictures, half(pictures, right=True))], 0)

    def first_thing(pictures: np.ndarray, pairs: Pairs) -> np.ndarray:
        return np.any([_thing(scorer, part, pairs) for part in (pictures, half(pictures, right=False))], 0)

    def usable(name: str, colour: str) -> bool:
        return name != other

    return Case(with_article(other), True, ask, shows, {"other thing": first_thing, "background": _background}, usable)


def _thing(scorer: Scorer, pictures: np.ndarray, pairs: Pairs) -> np.ndarray:
    return scorer.right(pictures, [name for name, _ in pairs])


def _background(pictures: np.ndarray, pairs: Pairs) -> np.ndarray:
    return np.array(pixel_metrics.background(pictures)) == np.array([colour for _, colour in pairs])


def removed(drawer: Drawer, case: Case, scale: float | None, wanted: int, most: int, seeds: str = "reported") -> dict[str, Any]:
    """The figures of one case over `wanted` pictures that show the unwanted thing, found among at most `most`.

    left: the share that still shows it, also under an unrelated negative: what any change of such pictures would leave. kept: the share
    that has what it should, and relative to that under the unrelated negative; None where that hardly ever has it (the colour of a
    background that was grayscale). moved: mean levels to the same seed's picture without negative.
    """
    before, after, other = [], [], []
    chosen: Pairs = []
    stream = (pair for pair in compositions("train") if case.usable(*pair) and pair[0] not in UNRELATED)
    seed = FIRST_SEED[seeds]
    with tqdm(total=wanted, desc=f"{case.negative}{'' if case.asked else ', unasked'}", leave=False) as bar:
        together = min(ROUND, most)
        for start in range(0, most, together):
            pairs = list(islice(stream, together))
            prompts, numbers = [case.prompt(*pair) for pair in pairs], list(range(seed + start, seed + start + together))
            pictures = drawer(prompts, numbers)
            places = np.flatnonzero(case.shows(pictures))[: wanted - len(chosen)]
            if len(places):
                those, their = [prompts[i] for i in places], [numbers[i] for i in places]
                before.append(pictures[places])
                after.append(drawer(those, their, case.negative, scale))
                other.append(drawer(those, their, UNRELATED, scale))
                chosen += [pairs[i] for i in places]
                bar.update(len(places))
            looked = start + together
            if len(chosen) == wanted or (not chosen and looked >= HOPELESS):
                break
    document: dict[str, Any] = {"negative": case.negative, "asked": case.asked, "found": len(chosen), "looked at": looked}
    if chosen:
        first, second, third = (np.concatenate(each) for each in (before, after, other))
        document["left"], document["left, unrelated negative"] = share(case.shows(second)), share(case.shows(third))
        for name, judge in case.kept.items():
            ours, theirs = judge(second, chosen), judge(third, chosen)
            relative = float(ours.mean() / theirs.mean()) if theirs.mean() > RARE else None
            document[f"kept {name}"] = {"relative": relative, **share(ours)}
        document["moved"] = float(np.abs(second.astype(np.int16) - first).mean())
    return document


def unrelated_change(drawer: Drawer, scale: float | None, count: int = 64) -> dict[str, float]:
    """Mean levels by which negatives that have nothing to do with a clean picture change it."""
    fitting = (pair for pair in compositions("train") if pair[1] != "green" and pair[0] not in UNRELATED)
    pairs = list(islice(fitting, count))
    prompts, seeds = [plain(*pair) for pair in pairs], list(range(count))
    clean = drawer(prompts, seeds).astype(np.int16)
    negatives = ("blurry", "grainy", UNRELATED, "a green background")
    return {negative: float(np.abs(drawer(prompts, seeds, negative, scale) - clean).mean()) for negative in negatives}


def half(pictures: np.ndarray, right: bool) -> np.ndarray:
    """The middle square of one half of each picture, (N, H/2, H/2, 3)."""
    side = pictures.shape[1] // 2
    return pictures[:, side // 2 : side // 2 + side, side:] if right else pictures[:, side // 2 : side // 2 + side, :side]
