"""What a negative prompt should do to a scene: leave out what it names, and nothing else.

The rows are made from scenes, as captions are: `a blurry cat` less `blurry` is `a cat`, and `a cat` less `a dog` is `a cat`.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from snoopi_rt.export.small_model.dataset.scene import DEFAULT_STYLE, STYLES, Scene, Vocabulary, caption, plain_caption
from snoopi_rt.export.small_model.dataset.vocabulary import (
    COLOUR_SYNONYMS,
    COLOURS,
    DEFAULT_BACKGROUND,
    FLAWS,
    plural,
    things,
    with_article,
)
from snoopi_rt.export.training.edits import Edit

INSTEAD_OF_WHITE = "gray"
"""The background of a picture that must not have a white one."""
CHANGES = 0.5  # share of rows whose negative has anything to do with the prompt
OF_TWO = 0.35  # share of those that take away one of two things: what is left moves and grows, which is learned last
FLAWED = 0.4  # share of the others in which a flaw is asked for
AKIN = 0.4  # share of pairs, and of things that are not there, that are akin to what is shown: a queen less a king is learned last of all
KIN = 3  # lines of vocabulary.txt
BARE = 0.35  # share of named backgrounds that the negative calls only "background", or only by their colour
SEVERAL = 0.3  # share of rows with several things to take away whose negative names two of them
LISTED = 0.5  # share of negatives in a list with words that name nothing in the picture
OTHER_FLAWS, OTHER_THINGS = 0.35, 0.15  # shares of such words that are other flaws and other things; the rest name nothing in any picture
STYLE_WORDS = {
    "3d": ("3d", "3d", "3d render", "3d style"),
    "flat": ("flat", "flat drawing", "flat style", "flat design", "flat icon"),
}
FLAW_WORDS = {
    "blurry": ("blur", "unsharp", "soft focus", "bokeh"),
    "pixelated": ("pixels", "pixelation", "pixel art", "mosaic", "blocky"),
    "grayscale": ("desaturated", "colorless", "black and white photo"),
    "grainy": ("grain", "noise", "film grain", "speckles"),
}
"""Words for flaws that only negative prompts use."""
GENERIC = (
    "low quality",
    "ugly",
    "deformed",
    "watermark",
    "bad anatomy",
    "worst quality",
    "text",
    "signature",
    "disfigured",
    "poorly drawn",
    "extra limbs",
    "jpeg artifacts",
    "cropped",
    "duplicate",
    "mutated",
    "bad proportions",
    "low resolution",
    "out of frame",
    "logo",
    "nsfw",
)


def draw_edit(vocabulary: Vocabulary, rng: np.random.Generator) -> Edit:
    """One row: half of them change the picture, the others must leave it as it is."""
    changes, of_two, flawed = rng.random() < CHANGES, rng.random() < OF_TWO, rng.random() < FLAWED
    while True:
        scene = vocabulary.draw_scene(rng)
        if not changes:
            prompt = _prompt(scene, rng)
            return Edit(prompt, _listed([_unrelated(scene, vocabulary, rng)], scene, vocabulary, rng), prompt)
        if of_two:
            if len(scene.things) != 2:
                continue
            if rng.random() < AKIN:
                scene = replace(scene, things=(scene.things[0], _akin(scene.things[0], rng)))
        elif flawed and not scene.flaw:
            continue
        choices = _changes(scene, rng)[: 1 if of_two else None]
        if choices:
            several = len(choices) > 1 and rng.random() < SEVERAL
            gone = [choices[i] for i in rng.permutation(len(choices))[: 2 if several else 1]]
            wanted = replace(scene, **{name: value for change in gone for name, value in change.fields.items()})
            return Edit(_prompt(scene, rng), _listed([change.negative for change in gone], scene, vocabulary, rng), plain_caption(wanted))


def _prompt(scene: Scene, rng: np.random.Generator) -> str:
    return caption(scene, rng) if rng.random() < 0.5 else plain_caption(scene)


@dataclass(frozen=True)
class Change:
    """What a negative takes away from a scene: the fields of the scene that is left."""

    negative: str
    fields: dict[str, Any]


def _changes(scene: Scene, rng: np.random.Generator) -> list[Change]:
    """What can be taken away from the scene, one entry per kind, one of two things first."""
    changes = []
    if len(scene.things) == 2:
        gone = int(rng.integers(2))
        changes.append(Change(_thing(scene.things[gone], rng), {"things": (scene.things[1 - gone],), "stacked": False}))
    if scene.flaw:
        changes.append(Change(_flaw(scene.flaw, rng), {"flaw": None}))
    if scene.colour:
        changes.append(Change(_colour(scene.colour, rng), {"colour": None}))
    if scene.background and scene.background != DEFAULT_BACKGROUND:
        bare = ("background", "background", scene.background)[: 2 if _named(scene.background, scene) else 3]
        negative = _one(bare, rng) if rng.random() < BARE else _background(scene.background, rng)
        changes.append(Change(negative, {"background": None}))
    elif rng.random() < 0.3:  # most scenes are white
        changes.append(Change(_background(DEFAULT_BACKGROUND, rng), {"background": INSTEAD_OF_WHITE}))
    if scene.style and scene.style != DEFAULT_STYLE:
        changes.append(Change(_one(STYLE_WORDS[scene.style], rng), {"style": None}))
    return changes


def _named(colour: str, scene: Scene) -> bool:
    """Whether the things are named by this word, too: an orange on an orange background."""
    return any(colour in name.split() for name in scene.things)


def _unrelated(scene: Scene, vocabulary: Vocabulary, rng: np.random.Generator) -> str:
    """A negative that names nothing of the scene."""
    kind = rng.random()
    if kind < 0.2:
        return _other_flaw(scene, rng)
    if kind < 0.28:
        return _one(GENERIC, rng)
    if kind < 0.35:
        style = _one([style for style in STYLES if style not in (DEFAULT_STYLE, scene.style)], rng)
        return _one(STYLE_WORDS[style], rng)
    if kind < 0.38 and scene.background in (None, DEFAULT_BACKGROUND):
        return "background"
    if kind < 0.84:
        akin = rng.random() < AKIN
        return _thing(_akin(_one(scene.things, rng), rng, scene.things) if akin else _other(scene.things, vocabulary, rng), rng)
    shown = (scene.colour, scene.background or DEFAULT_BACKGROUND, *scene.things)  # an orange is a thing, too
    colour = _one([colour for colour in COLOURS if colour not in shown], rng)
    return _background(colour, rng) if rng.random() < 0.5 else _colour(colour, rng)


def _other(shown: tuple[str, ...], vocabulary: Vocabulary, rng: np.random.Generator) -> str:
    """Another thing, and none that is a kind of what is shown, or the other way round: an old man is a man."""
    while any(_is_a_kind(other := vocabulary.thing(rng).name, name) for name in shown):
        pass
    return other


def _akin(name: str, rng: np.random.Generator, shown: tuple[str, ...] = ()) -> str:
    """Such a thing that stands near it in vocabulary.txt, in its group, as king and queen do."""
    (place,) = (place for place, thing in enumerate(things()) if thing.name == name)
    near = [thing.name for thing in things()[max(place - KIN, 0) : place + KIN + 1] if thing.group == things()[place].group]
    return _one([other for other in near if not any(_is_a_kind(other, one) for one in (name, *shown))], rng)


def _is_a_kind(one: str, other: str) -> bool:
    words, others = set(one.split()), set(other.split())
    return words <= others or words > others


def _listed(negatives: list[str], scene: Scene, vocabulary: Vocabulary, rng: np.random.Generator) -> str:
    """The negatives alone, or in a list with words that people often add, of which none names anything in the scene."""
    words = list(negatives)
    if rng.random() < LISTED:
        words += [_added(scene, vocabulary, rng) for _ in range(rng.integers(1, 5))]
    words = list(dict.fromkeys(words))
    return ", ".join(words[i] for i in rng.permutation(len(words)))


def _added(scene: Scene, vocabulary: Vocabulary, rng: np.random.Generator) -> str:
    kind = rng.random()
    if kind < OTHER_FLAWS:
        return _other_flaw(scene, rng)
    if kind < OTHER_FLAWS + OTHER_THINGS:
        return _thing(_other(scene.things, vocabulary, rng), rng)
    return _one(GENERIC, rng)


def _other_flaw(scene: Scene, rng: np.random.Generator) -> str:
    return _flaw(_one([flaw for flaw in FLAWS if flaw != scene.flaw], rng), rng)


def _flaw(flaw: str, rng: np.random.Generator) -> str:
    if rng.random() < 0.3:
        return _one(FLAW_WORDS[flaw], rng)
    word = _one((flaw, flaw, *FLAWS[flaw]), rng)
    return _one((word, word, word, f"{with_article(word)} picture", f"{word} photo"), rng)


def _thing(name: str, rng: np.random.Generator) -> str:
    names = next(thing.names for thing in things() if thing.name == name)
    word = name if rng.random() < 0.7 else _one(names, rng)
    return _one((with_article(word), with_article(word), word, plural(word)), rng)


def _colour(colour: str, rng: np.random.Generator) -> str:
    return _one((colour, colour, *COLOUR_SYNONYMS.get(colour, ())), rng)


def _background(colour: str, rng: np.random.Generator) -> str:
    word = _colour(colour, rng)
    return _one((f"{with_article(word)} background", f"{word} background", f"{word} background"), rng)


def _one(choices: tuple[str, ...] | list[str], rng: np.random.Generator) -> str:
    return choices[rng.integers(len(choices))]
