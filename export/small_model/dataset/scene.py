"""Random scenes, one per picture, and captions of them.

A caption determines its picture up to small shifts: what it does not name is always the same (a white background, the cartoon set, one
thing in the middle, no flaw), since a one-step student draws the average of what its caption allows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from snoopi_rt.export.small_model.dataset.vocabulary import (
    COLOUR_SYNONYMS,
    COLOURS,
    COUNTS,
    FLAWS,
    SIZES,
    Thing,
    plural,
    things,
    with_article,
    without_article,
)

STYLES = {
    "cartoon": ("a cartoon of {}", "cartoon {}", "{}, cartoon style", "{}, cartoon"),
    "3d": ("a 3d render of {}", "3d {}", "{}, 3d render", "{} in 3d", "a 3d drawing of {}"),
    "flat": ("a flat drawing of {}", "flat {}", "{}, flat design", "a flat icon of {}", "{}, flat style"),
}
DEFAULT_STYLE = "cartoon"
"""The set whose drawings the judge recognises best: 82 % in the top 5, against 75 % of flat and 72 % of 3d ones (Lite2, Twemoji)."""

# Shares of pictures.
COUNTED, TWO, COLOURED, SIZED = 0.10, 0.14, 0.11, 0.04  # the rest shows one thing as it is
FLAWED, BACKGROUND, STYLED = 0.16, 0.42, 0.24
COMMON = 2  # times as often as any other: how often a common thing is drawn

_ADJECTIVES = (
    "cute",
    "beautiful",
    "nice",
    "lovely",
    "pretty",
    "adorable",
    "cool",
    "funny",
    "happy",
    "simple",
    "single",
    "friendly",
    "sweet",
)
_PREFIXES = (
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "an icon of {}",
    "an emoji of {}",
    "a drawing of {}",
    "an illustration of {}",
    "draw {}",
    "please draw {}",
    "show me {}",
    "{} emoji",
    "{} icon",
)
_TAILS = (", high quality", ", highly detailed", ", 4k", ", best quality", ", masterpiece", "!", ".", " please", ", simple", ", sharp")
_PLACES = (
    "{} on {a} background",
    "{} on {a} background",
    "{} on {a} background",
    "{} with {a} background",
    "{} against {a} background",
    "{} in front of {a} background",
    "{}, {colour} background",
    "{} {colour} background",
    "{} on {colour}",
    "{} against {colour}",
    "{} on a plain {colour} background",
)
BESIDE = ("{} and {}", "{} and {}", "{} and {}", "{} next to {}", "{} beside {}", "{} with {}", "{} by {}")
ABOVE = ("{} above {}", "{} on top of {}", "{} over {}")
BELOW = ("{} below {}", "{} under {}", "{} beneath {}")


@dataclass(frozen=True)
class Scene:
    """What one picture shows. None is the default: a white background, the cartoon set, the usual size and colour, no flaw."""

    things: tuple[str, ...]
    """One or two usual names; of two the first is on the left, or above."""
    count: int = 1
    """1 to 3 of a single thing."""
    colour: str | None = None
    size: str | None = None
    stacked: bool = False
    """Whether two things stand one above the other."""
    background: str | None = None
    style: str | None = None
    flaw: str | None = None


class Vocabulary:
    """The things that can be drawn, and those whose colour can be changed."""

    def __init__(self, colourable: Sequence[str]):
        self.colourable = list(colourable)
        self._colourable = set(colourable)
        self._all = things()
        weights = np.array([COMMON if thing.common else 1 for thing in self._all], float)
        self._weights = weights / weights.sum()
        self._common = {thing.name for thing in self._all if thing.common}

    def thing(self, rng: np.random.Generator) -> Thing:
        return self._all[rng.choice(len(self._all), p=self._weights)]

    def can_be_coloured(self, name: str) -> bool:
        return name in self._colourable

    def draw_scene(self, rng: np.random.Generator) -> Scene:
        """A random scene; a colour that the caption gives a thing differs from its background's."""
        first = self.thing(rng)
        scene = Scene((first.name,))
        kind = rng.random()
        if kind < COUNTED:
            while first.name in without_article():
                first = self.thing(rng)
            scene = Scene((first.name,), count=int(rng.integers(2, 4)))
        elif kind < COUNTED + TWO:
            second = self.thing(rng)
            while second.name == first.name:
                second = self.thing(rng)
            scene = Scene((first.name, second.name), stacked=bool(rng.random() < 0.2))
        elif kind < COUNTED + TWO + COLOURED:
            while not self.can_be_coloured(first.name):
                first = self.thing(rng)
            scene = Scene(
                (first.name,), colour=_one(list(COLOURS), rng), count=1 if rng.random() < 0.9 or first.name in without_article() else 2
            )
        elif kind < COUNTED + TWO + COLOURED + SIZED:
            scene = Scene((first.name,), size=_one(list(SIZES), rng))
        background = _one(list(COLOURS), rng) if rng.random() < BACKGROUND else None
        while background is not None and background == scene.colour:
            background = _one(list(COLOURS), rng)
        style = _one(list(STYLES), rng) if rng.random() < STYLED else None
        flaw = _one(list(FLAWS), rng) if rng.random() < FLAWED else None
        return replace(scene, background=background, style=style, flaw=flaw)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the many ways to describe the scene."""
    flaw = None if scene.flaw is None else _one((scene.flaw, scene.flaw, scene.flaw, *FLAWS[scene.flaw]), rng)
    flaw_first = flaw is not None and rng.random() < 0.35 and len(scene.things) == 1
    if len(scene.things) == 2:
        one, two = (_subject(name, rng) for name in scene.things)
        if scene.stacked and rng.random() < 0.4:
            text = _one(BELOW, rng).format(two, one)
        else:
            text = _one(ABOVE if scene.stacked else BESIDE, rng).format(one, two)
    else:
        words = [flaw] if flaw_first else []
        text = _subject(scene.things[0], rng, scene.count, scene.size, scene.colour, [word for word in words if word])
    if scene.style is not None:
        text = _one(STYLES[scene.style], rng).format(text)
    elif rng.random() < 0.25:
        text = _one(_PREFIXES, rng).format(text)
    elif flaw and not flaw_first and rng.random() < 0.4:
        text, flaw_first = f"{with_article(flaw)} {_one(('picture', 'photo', 'image'), rng)} of {text}", True
    if scene.background is not None:
        colour = _one((scene.background, scene.background, *COLOUR_SYNONYMS.get(scene.background, ())), rng)
        text = _one(_PLACES, rng).format(text, a=with_article(colour), colour=colour)
    if flaw and not flaw_first:
        text += f", {flaw}"
    if rng.random() < 0.15:
        text += _one(_TAILS, rng)
    return text


def plain_caption(scene: Scene) -> str:
    """The shortest usual description: `a blurry blue car on a red background`."""
    if len(scene.things) == 2:
        one, two = (with_article(name) for name in scene.things)
        text = f"{one} above {two}" if scene.stacked else f"{one} and {two}"
        text = f"{scene.flaw} picture of {text}" if scene.flaw else text
        text = with_article(text) if scene.flaw else text
    else:
        words = [scene.flaw, scene.size, scene.colour]
        text = _with_words(scene.things[0], [word for word in words if word], scene.count)
    if scene.style is not None:
        text = STYLES[scene.style][0].format(text)
    return f"{text} on {with_article(scene.background)} background" if scene.background else text


def _subject(
    name: str, rng: np.random.Generator, count: int = 1, size: str | None = None, colour: str | None = None, words: Sequence[str] = ()
) -> str:
    names = _names(name)
    noun = names[0] if rng.random() < 0.7 else _one(names, rng)
    if count > 1 and noun in without_article():
        noun = names[0]
    adjectives = list(words)
    if rng.random() < 0.12:
        adjectives.append(_one(_ADJECTIVES, rng))
    if size:
        adjectives.append(_one((size, size, *SIZES[size]), rng))
    if colour:
        adjectives.append(_one((colour, colour, colour, *COLOUR_SYNONYMS.get(colour, ())), rng))
    return _with_words(noun, adjectives, count, rng)


def _with_words(name: str, adjectives: Sequence[str], count: int, rng: np.random.Generator | None = None) -> str:
    phrase = " ".join([*adjectives, name if count == 1 else plural(name)])
    if count > 1:
        # A plural without a number means two.
        number = COUNTS[count] if rng is None or rng.random() < 0.75 else ("2", "3")[count - 2]
        bare = rng is not None and count == 2 and rng.random() < 0.2
        return phrase if bare else f"{number} {phrase}"
    if name in without_article():
        return phrase
    article = 1.0 if rng is None else rng.random()
    if article < 0.22:
        return phrase
    if article < 0.28:
        return f"the {phrase}"
    return with_article(phrase)


@cache
def _names(name: str) -> tuple[str, ...]:
    return {thing.name: thing.names for thing in things()}[name]


def _one(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
