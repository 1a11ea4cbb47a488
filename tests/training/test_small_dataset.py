"""The captions of the small model determine their pictures, and every word of them is true."""

import itertools
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from snoopi_rt.export.small_model.dataset.compose import Composer, recoloured
from snoopi_rt.export.small_model.dataset.edits import FLAW_WORDS, KIN, _other, draw_edit
from snoopi_rt.export.small_model.dataset.scene import STYLES, Scene, Vocabulary, caption, plain_caption
from snoopi_rt.export.small_model.dataset.sprites import SIDE, TRAINED, UNSEEN, load_sprites
from snoopi_rt.export.small_model.dataset.vocabulary import (
    COLOUR_SYNONYMS,
    COLOURS,
    FLAWS,
    plural,
    things,
    with_article,
    without_article,
)

HUES = ("red", "yellow", "green", "blue", "purple")


@pytest.fixture(scope="module")
def composer() -> Composer:
    """Every thing is a coloured square with a black dot, of a hue of its own in each style."""
    sprites = {}
    for number, (thing, style) in enumerate(itertools.product(things(), STYLES)):
        image = Image.new("RGBA", (256, 256))
        pen = ImageDraw.Draw(image)
        pen.rectangle((20, 20, 235, 235), fill=(*COLOURS[HUES[number % len(HUES)]], 255))
        pen.ellipse((100, 60, 140, 100), fill=(0, 0, 0, 255))
        sprites[thing.name, style] = image
    return Composer(sprites)


@pytest.fixture(scope="module")
def vocabulary(composer: Composer) -> Vocabulary:
    return Vocabulary(composer.colourable())


def test_at_least_300_things_each_of_whose_names_is_its_own() -> None:
    names = [name for thing in things() for name in thing.names]
    assert len(things()) >= 300 and len(names) == len(set(names))
    assert without_article() & set(names)


@pytest.mark.parametrize(
    ("name", "words", "many"),
    [
        ("apple", "an apple", "apples"),
        ("mouse", "a mouse", "mice"),
        ("cherry", "a cherry", "cherries"),
        ("old man", "an old man", "old men"),
        ("leaf", "a leaf", "leaves"),
        ("umbrella", "an umbrella", "umbrellas"),
        ("unicorn", "a unicorn", "unicorns"),
        ("hourglass", "an hourglass", "hourglasses"),
        ("grapes", "grapes", "grapes"),
        ("bus", "a bus", "buses"),
        ("monkey", "a monkey", "monkeys"),
        ("tomato", "a tomato", "tomatoes"),
        ("piano", "a piano", "pianos"),
        ("watch", "a watch", "watches"),
    ],
)
def test_articles_and_plurals_are_english(name: str, words: str, many: str) -> None:
    assert (with_article(name), plural(name)) == (words, many)


def test_a_caption_says_all_that_its_scene_has_and_nothing_else(vocabulary: Vocabulary) -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        scene = vocabulary.draw_scene(rng)
        text = f" {caption(scene, rng)} ".replace(",", " ").replace("!", " ").replace(".", " ")
        shown = {scene.colour, scene.background}
        names = sorted({name for thing in things() if thing.name in scene.things for name in thing.names}, key=len, reverse=True)
        for name in names:
            text = text.replace(f" {name} ", " ")  # "an orange", "a green apple" are names
        for colour in COLOURS:
            named = any(f" {word} " in text for word in (colour, *COLOUR_SYNONYMS.get(colour, ())))
            assert not named or colour in shown or (scene.flaw == "grayscale" and colour in ("black", "white")), (text, scene)
        for flaw, synonyms in FLAWS.items():
            assert any(f" {word} " in text for word in (flaw, *synonyms)) == (scene.flaw == flaw), (text, scene)
        for style in ("3d", "flat"):
            assert (f" {style} " in text) == (scene.style == style), (text, scene)


def test_a_picture_depends_on_scene_and_generator_alone_and_is_the_same_at_both_sizes(composer: Composer, vocabulary: Vocabulary) -> None:
    for seed in range(20):
        scene = vocabulary.draw_scene(np.random.default_rng(seed))
        small, again = (composer.draw(scene, np.random.default_rng(seed), 128) for _ in range(2))
        assert np.array_equal(small, again)
        large = composer.draw(scene, np.random.default_rng(seed), 256)
        halved = np.asarray(Image.fromarray(large).resize((128, 128), Image.Resampling.BOX)).astype(float)
        assert np.abs(halved - small).mean() < (12 if scene.flaw == "grainy" else 5), scene


def test_what_is_not_named_is_white_and_what_is_named_is_there(composer: Composer) -> None:
    plain = composer.draw(Scene(("cat",)), np.random.default_rng(1), 128)
    assert (plain[0] == 255).all() and (plain[:, 0] == 255).all()
    red = composer.draw(Scene(("cat",), background="red"), np.random.default_rng(1), 128)
    assert np.abs(red[0].astype(int) - COLOURS["red"]).max() <= 4
    one, three = (composer.draw(Scene(("cat",), count=count), np.random.default_rng(1), 128) for count in (1, 3))
    assert 0.3 < (three.min(-1) < 128).mean() / (one.min(-1) < 128).mean() < 1.2 and not np.array_equal(one, three)


@pytest.mark.parametrize("colour", COLOURS)
def test_a_recoloured_thing_has_that_colour_and_keeps_the_rest(colour: str) -> None:
    sprite = Image.new("RGBA", (64, 64), (214, 40, 44, 255))
    sprite.paste((0, 0, 0, 255), (0, 0, 16, 16))
    changed = np.asarray(recoloured(sprite, colour)).astype(int)
    nearest = min(COLOURS, key=lambda name: np.abs(changed[40, 40, :3] - COLOURS[name]).sum())
    assert nearest == colour
    assert (changed[4, 4, :3] == 0).all() and (changed[..., 3] == 255).all()


def test_an_edit_takes_away_what_its_negative_names_and_nothing_else(vocabulary: Vocabulary) -> None:
    rng = np.random.default_rng(0)
    edits = [draw_edit(vocabulary, rng) for _ in range(2000)]
    changes = [edit for edit in edits if edit.changes]
    assert 0.4 < len(changes) / len(edits) < 0.6
    for edit in edits:
        words = {word.strip() for word in edit.negative.split(",")}
        asked = {flaw for flaw, synonyms in FLAWS.items() if any(name in edit.prompt for name in (flaw, *synonyms))}
        names = {flaw: (flaw, *FLAWS[flaw], *FLAW_WORDS[flaw]) for flaw in FLAWS}
        named = {flaw for flaw in FLAWS if any(name in word for word in words for name in names[flaw])}
        if asked & named:
            assert edit.changes and not any(flaw in edit.wanted_prompt for flaw in asked & named), edit
        elif not edit.changes:
            assert edit.wanted_prompt == edit.prompt
    unchanged = {edit.negative for edit in edits if not edit.changes}
    assert unchanged & set(COLOURS) and any(negative.endswith("background") for negative in unchanged)
    assert any("on a gray background" in edit.wanted_prompt for edit in changes if "white background" in edit.negative)


def test_a_negative_may_name_several_things_of_which_some_are_there(vocabulary: Vocabulary) -> None:
    rng = np.random.default_rng(1)
    edits = [draw_edit(vocabulary, rng) for _ in range(5000)]
    lists = [(edit, {word.strip() for word in edit.negative.split(",")}) for edit in edits]
    asked = [(edit, words) for edit, words in lists if edit.prompt.startswith("a blurry ") and edit.prompt.endswith(" on a red background")]
    both = [edit for edit, words in asked if words & {"blurry", "blur"} and words & {"background", "red background"}]
    assert both and not any("blurry" in edit.wanted_prompt or "background" in edit.wanted_prompt for edit in both)
    blur = [words for edit, words in lists if edit.changes and words & {"blurry", "blur"}]
    assert 0.1 < np.mean([bool(words & {"grainy", "grain", "noise", "pixelated", "pixels", "grayscale"}) for words in blur]) < 0.6


def test_edits_tell_apart_what_is_akin_and_styles_and_bare_backgrounds(vocabulary: Vocabulary) -> None:
    rng = np.random.default_rng(0)
    edits = {(edit.prompt, edit.negative): edit for edit in (draw_edit(vocabulary, rng) for _ in range(20_000))}.values()
    place = {with_article(thing.name): number for number, thing in enumerate(things())}
    for changes in (True, False):  # a king and a queen less a king; a queen less a king
        both = [(edit.negative, edit.wanted_prompt) for edit in edits if edit.changes == changes]
        far = [abs(place[one] - place[other]) for one, other in both if one in place and other in place]
        assert 0.3 < np.mean(np.array(far) <= KIN) < 0.5
    assert any(edit.prompt.startswith("a 3d render of") and edit.negative == "flat drawing" and not edit.changes for edit in edits)
    bare = [edit for edit in edits if edit.negative == "background"]
    assert {edit.changes for edit in bare} == {True, False}
    assert not any("background" in edit.wanted_prompt for edit in bare if edit.changes)
    red = [edit for edit in edits if edit.prompt.endswith("on a red background") and edit.negative in ("background", "red background")]
    assert red and all(edit.changes for edit in red)


def test_no_negative_of_a_picture_that_must_stay_names_a_kind_of_what_is_shown(vocabulary: Vocabulary) -> None:
    rng = np.random.default_rng(0)
    edits = [draw_edit(vocabulary, rng) for _ in range(20_000)]
    of_men = [edit for edit in edits if edit.prompt == "an old man" and not edit.changes]
    assert of_men and not any({"man", "a man", "men"} & {word.strip() for word in edit.negative.split(",")} for edit in of_men)
    shown = ("old man",)
    with_men = [_other(shown, vocabulary, rng) for _ in range(20_000)]
    assert len(set(with_men)) > 300 and not {"man", "old man"} & set(with_men)


def test_plain_captions_are_what_one_would_say() -> None:
    assert plain_caption(Scene(("car",), colour="blue", background="red", flaw="blurry")) == "a blurry blue car on a red background"
    assert plain_caption(Scene(("cat", "dog"), flaw="grainy")) == "a grainy picture of a cat and a dog"
    assert plain_caption(Scene(("apple",), count=2, style="3d")) == "a 3d render of two apples"
    assert plain_caption(Scene(("bee", "flower"), stacked=True)) == "a bee above a flower"


def test_every_thing_has_a_drawing_in_every_set_that_ships():
    for drawing in (*TRAINED, UNSEEN):
        with zipfile.ZipFile(drawing.path) as archive:
            assert archive.testzip() is None and [Path(name).stem for name in archive.namelist()] == [thing.name for thing in things()]
    sprites = load_sprites((*TRAINED, UNSEEN), ["cat", "robot"])
    assert len(sprites) == 8 and all(sprite.size == (SIDE, SIDE) and sprite.getbbox() for sprite in sprites.values())
