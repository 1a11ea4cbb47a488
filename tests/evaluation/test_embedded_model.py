"""The embedded model keeps the README's promises, on a few pictures; `snoopi-rt eval small` measures them on thousands."""

from collections.abc import Iterator

import numpy as np
import pytest

import snoopi_rt
from snoopi_rt.engines import installed
from snoopi_rt.export.evaluation import pixel_metrics
from snoopi_rt.export.evaluation.small.clean import GENERIC

pytestmark = pytest.mark.skipif("cpu" not in installed(), reason="needs an engine")
THINGS = ("hamburger", "fox", "car", "apple", "rocket", "butterfly", "castle", "cat")  # none of them gray or of fine lines

SHOWN = {"blurry": 2.0, "pixelated": 0.28, "grainy": 6.0, "grayscale": 135.0}
"""How far the flaw's metric must rise. Of composed drawings it rises by 6.3, 0.69, 25.6 and 224.5; the model's own pictures are softer than
they, and its grain is weaker: by 2.9, 0.40, 7.8 and 195."""
NOUNS = {"blurry": "blur", "pixelated": "pixels", "grainy": "noise", "grayscale": "black and white"}
"""What people also call them."""
CHANGED = {"blurry": 2.0, GENERIC: 2.0, "a bicycle": 4.0}
"""Levels of 255 by which a thing that shows none of it may change. The model reaches 1.2, 1.4 and 2.9; the goal is 3."""
SHARP = 1.0e6
"""The energy of fine detail that the median thing must have. Composed drawings have 2.6e6, the model 1.3e6, a soft decoder 0.7e6."""


@pytest.fixture(scope="module")
def pipe() -> Iterator[snoopi_rt.Pipeline]:
    with snoopi_rt.load(engine="cpu") as opened:
        yield opened


def drawn(pipe: snoopi_rt.Pipeline, prompt: str, negative: str | None = None) -> np.ndarray:
    """A picture of the prompt for each thing."""
    seeds = list(range(len(THINGS)))
    return pipe.generate([prompt.format(thing) for thing in THINGS], negative, seed=seeds).images


@pytest.mark.parametrize("flaw", pixel_metrics.FLAWS)
def test_a_flaw_that_is_asked_for_is_there_and_goes_under_its_negative_prompt(pipe: snoopi_rt.Pipeline, flaw: str) -> None:
    flawed = f"a {flaw} {{}} on a yellow background"
    others = [other for other in pixel_metrics.FLAWS if other != flaw]
    negatives = (flaw, NOUNS[flaw], f"ugly, low quality, {flaw}", *(f"{other}, {flaw}" for other in others))
    pictures = (drawn(pipe, "a {} on a yellow background"), drawn(pipe, flawed), *(drawn(pipe, flawed, negative) for negative in negatives))
    clean, asked, *removed = (np.median(pixel_metrics.FLAWS[flaw](few)) for few in pictures)
    assert asked - clean > SHOWN[flaw]
    gone = {negative: (asked - left) / (asked - clean) for negative, left in zip(negatives, removed, strict=True)}
    assert min(gone.values()) > 0.7, gone


def test_the_background_is_white_where_none_is_named_and_the_named_one_else(pipe: snoopi_rt.Pipeline) -> None:
    assert pixel_metrics.white(drawn(pipe, "a {}")).all()
    assert pixel_metrics.background(drawn(pipe, "a {} on a purple background")) == ["purple"] * len(THINGS)
    assert pixel_metrics.white(drawn(pipe, "a {} on a purple background", "purple background")).sum() >= len(THINGS) - 1


def test_outlines_are_sharp(pipe: snoopi_rt.Pipeline) -> None:
    assert np.median(pixel_metrics.fine_detail(drawn(pipe, "a {}"))) > SHARP


@pytest.mark.parametrize("negative", CHANGED)
def test_a_negative_prompt_that_names_nothing_of_a_picture_changes_it_little(pipe: snoopi_rt.Pipeline, negative: str) -> None:
    assert pixel_metrics.change(drawn(pipe, "a {}"), drawn(pipe, "a {}", negative)).mean() < CHANGED[negative]
