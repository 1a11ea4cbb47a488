"""What a negative prompt does: of pictures that show something unwanted, the share that still shows it, and what of the rest is kept."""

from collections.abc import Callable
from dataclasses import dataclass
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
    kept: dict[str, Callable[[np.ndarray, list[tuple[str, str]]], np.ndarray]]
    usable: Callable[[str, str], bool] = lambda name, colour: True


def cases(scorer: Scorer, limits: Limits) -> list[Case]:
    """Flaws, background colours and one thing of two, asked for and, of the first two, unasked."""

    def thing(pictures: np.ndarray, pairs: list[tuple[str, str]]) -> np.ndarray:
        return scorer.right(pictures, [name for name, _ in pairs])

    def background(pictures: np.ndarray, pairs: list[tuple[str, str]]) -> np.ndarray:
        return np.array(pixel_metrics.background(pictures)) == np.array([colour for _, colour in pairs])

    found = []
    for flaw in QUALITIES:
        common = {
            "negative": flaw,
            "shows": lambda pictures, flaw=flaw: limits.shows(pictures, flaw),
            "kept": {"thing": thing, "background": background},
            # There grayscale cannot be told from the picture as it should be.
            "usable": lambda name, colour, flaw=flaw: flaw != "grayscale" or colour not in NEUTRAL,
        }
        found.append(Case(asked=True, prompt=lambda name, colour, flaw=flaw: plain(name, colour, flaw), **common))
        found.append(Case(asked=False, prompt=plain, **common))
    for colour in BACKGROUNDS:
        common = {
            "negative": f"{with_article(colour)} background",
            "shows": lambda pictures, colour=colour: np.array(pixel_metrics.background(pictures)) == colour,
            "kept": {"thing": thing},
        }
        found.append(Case(asked=True, prompt=lambda name, _, colour=colour: plain(name, colour), **common))
        found.append(Case(asked=False, prompt=lambda name, _: with_article(name), **common))
    for other in ("dog", "apple", "car", "star"):
        place = NAMES.index(other)
        found.append(
            Case(
                with_article(other),
                True,
                lambda name, colour, other=other: f"{with_article(name)} and {with_article(other)} on {with_article(colour)} background",
                lambda pictures, place=place: scorer(half(pictures, right=True))[1] == place,
                {"other thing": lambda pictures, pairs: thing(half(pictures, right=False), pairs), "background": background},
                lambda name, colour, other=other: name != other,
            )
        )
    return found


def removed(drawer: Drawer, case: Case, scale: float | None, wanted: int, most: int, seeds: str = "reported") -> dict[str, Any]:
    """The figures of one case over `wanted` pictures that show the unwanted thing, found among at most `most`.

    left: the share that still shows it, also under an unrelated negative: what any change of such pictures would leave. kept: the share
    that has what it should, and relative to that under the unrelated negative; None where that hardly ever has it (the colour of a
    background that was grayscale). moved: mean levels to the same seed's picture without negative.
    """
    before, after, other, chosen = [], [], [], []
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
            if len(chosen) == wanted:
                break
    document: dict[str, Any] = {"negative": case.negative, "asked": case.asked, "found": len(chosen)}
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
