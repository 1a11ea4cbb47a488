"""What a narrow model knows: prompts against the words of bundle.json."""

import json
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from serving import served

from snoopi_rt.batch.index import INDEX
from snoopi_rt.batch.runner import Batch
from snoopi_rt.bundle.bundle import Bundle, Vocabulary
from snoopi_rt.cache import Cache
from snoopi_rt.cli.main import main
from snoopi_rt.engines import installed
from snoopi_rt.engines.fake import FakeEngine
from snoopi_rt.export.small_model.bundle_vocabulary import EXAMPLES, read_related, vocabulary
from snoopi_rt.export.small_model.dataset.scene import Vocabulary as Scenes
from snoopi_rt.export.small_model.dataset.scene import caption
from snoopi_rt.pipeline import EMBEDDED, Pipeline
from snoopi_rt.runtime.vocabulary import Matcher, Unknown
from snoopi_rt.server.settings import Settings

needs_engine = pytest.mark.skipif("cpu" not in installed(), reason="needs an engine")

KNOWN = """
a cat
Dog
two apples
A BLUE CAR!
kittens
a photo of a horse on an orange background
an orange
three mice
cute unicorn, 4k, highly detailed
a castle in front of a forest
icecream
Please draw me a robot.
T-Shirt
a cat and a dog
cats and dogs
a fluffy white rabbit sleeping in a basket
can you show me a picture of a dragon breathing fire?
an old photo of a red double decker bus
slices of pizza
the king's crown
black and white panda, blurry background
sad emoji
watercolor painting of a rose
wolves
a bowl of cherries
a field of sunflowers at dawn
lion cub
hot-dog
a cat wearing a submarine captain's hat
grumpy old wizard with a long beard
pixelated fire truck, flat style
a tiny ladybird on a leaf
smiley
snowmen
my grandma's couch
3d render of a palm tree
a rubber duck
bicycle against a green background
thumbs up
I would like to see an elephant
""".strip().splitlines()

UNKNOWN = {
    "a submarine": "submarine",
    "A huge red SUBMARINE!": "submarine",
    "an orange submarine on an orange background": "submarine",
    "submarines": "submarines",
    "a blurry photo of a toaster": "toaster",
    "a train station": "train station",
    "a fire hydrant on a street": "fire hydrant",
    "hot dog stand": "hot dog stand",
    "cute donkey, 4k": "donkey",
    "two donkeys eating apples": "donkeys",
    "a washing machine": "machine",
    "a bowl of cereal": "cereal",
    "a pair of pliers": "pliers",
    "draw me a lighthouse by the sea": "lighthouse",
    "the eiffel tower": "tower",
    "a cat and a submarine": "submarine",
    "a swan above a castle": "swan",
    "walrus with a hat": "walrus",
    "three swans": "swans",
    "black and white penguins' igloo": "penguins igloo",
    "a flat drawing of a windmill": "windmill",
    "VACUUM CLEANER": "cleaner",
    "a cow shed": "cow shed",
    "santa's sleigh": "santa sleigh",
    "a hores": "hores",
    "knife": "knife",
    "a shiny silver trombone, cartoon style": "trombone",
    "a saxophone in front of a piano": "saxophone",
    "lawnmower, grainy": "lawnmower",
    "please paint a beautiful waterfall": "waterfall",
    "a necklace made of gold": "necklace",
    "scorpion under a tree": "scorpion",
    "bathtub": "bathtub",
    "a tiny green lizard on a pink background": "lizard",
    "an icon of a stapler": "stapler",
    "cactus fence": "cactus fence",
    "a walking stick": "stick",
    "Кошка": "кошка",
    "wheelchair ramp": "ramp",
    "blurry": None,
}


@pytest.fixture(scope="module")
def matcher() -> Matcher:
    return Matcher(vocabulary())


def test_what_strangers_type_for_known_things_is_known(matcher: Matcher) -> None:
    assert {prompt: unknown for prompt in (*KNOWN, *EXAMPLES) if (unknown := matcher.unknown(prompt))} == {}
    names = [name for thing, synonyms in vocabulary().objects.items() for name in (thing, *synonyms)]
    assert {name: unknown for name in names if (unknown := matcher.unknown(f"TWO {name.upper()}!"))} == {}


def test_the_related_words_are_of_things_that_it_knows_and_are_no_names_of_any(matcher: Matcher) -> None:
    assert read_related() == vocabulary().related, "run tools/related_words.py"
    words = {word for related in read_related().values() for word in related.split()}
    assert len(words) > 4000 and all(map(matcher.unknown, words))


def test_captions_of_the_training_are_known(matcher: Matcher) -> None:
    scenes, rng = Scenes(list(vocabulary().objects)), np.random.default_rng(1)
    captions = [caption(scenes.draw_scene(rng), rng) for _ in range(1000)]
    assert {text: unknown for text in captions if (unknown := matcher.unknown(text))} == {}


@pytest.mark.parametrize(
    ("prompt", "number"),
    [
        ("five cats", "five"),
        ("FOUR ripe bananas on a plate", "four"),
        ("a cat and 12 dogs", "12"),
        ("a dozen eggs", "dozen"),
        ("one hundred red balloons", "hundred"),
        ("many stars", "many"),
        ("lots of cats", "lots"),
        ("several dogs", "several"),
        ("many submarines", None),
        ("100 cats", "100"),
        ("a cat, a bird and seven small dogs", "seven"),
        ("three cats", None),
        ("2 dogs", None),
        ("a cat, 4k", None),
        ("a ten year old cat", None),
        ("a 1980 car", None),
        ("a cat with nine lives", None),
        ("five submarines", None),
    ],
)
def test_a_number_of_known_things_above_the_highest_is_too_many(matcher: Matcher, prompt: str, number: str | None) -> None:
    assert matcher.too_many(prompt) == number
    assert Matcher(replace(vocabulary(), counts=())).too_many(prompt) is None, "it does not say how many it draws"


@pytest.mark.parametrize(
    ("prompt", "colour"),
    [
        ("a Cyan house", "cyan"),
        ("a cat on a transparent background", "transparent"),
        ("a cat, teal background", "teal"),
        ("a violet cat on grey", None),
        ("a tealight candle", None),
    ],
)
def test_a_colour_that_is_not_in_the_vocabulary_is_unknown(matcher: Matcher, prompt: str, colour: str | None) -> None:
    assert matcher.unknown_colour(prompt) == colour and matcher.unknown(prompt) is None
    assert Matcher(replace(vocabulary(), colours=())).unknown_colour(prompt) is None, "it does not say which it knows"
    assert Matcher(replace(vocabulary(), colours=("Teal", "cyan", "transparent"))).unknown_colour(prompt) is None


def test_of_other_prompts_the_noun_is_named_and_no_adjective_colour_or_number(matcher: Matcher) -> None:
    unknown = {prompt: matcher.unknown(prompt) for prompt in UNKNOWN}
    assert {prompt: found and found.object for prompt, found in unknown.items()} == UNKNOWN


@pytest.mark.parametrize(
    ("prompt", "nearest"),
    [
        ("a hores", ("horse", "house")),
        ("elefant", ("elephant",)),
        ("an elephnat", ("elephant",)),
        ("a fire hydrant", ("fire",)),
        ("a bag", ("money bag", "backpack")),
        ("cup", None),
        ("xyz", ()),
        ("a submarine", ("dolphin", "sailboat")),
        ("a saxophones", ("violin", "trumpet")),
    ],
)
def test_nearest_are_objects_that_share_a_word_or_mean_or_are_spelled_nearly_the_same(
    matcher: Matcher, prompt: str, nearest: tuple[str, ...] | None
) -> None:
    unknown = matcher.unknown(prompt)
    assert (unknown and unknown.nearest) == nearest


@pytest.mark.parametrize(
    "prompt", ["a" * 100_000, "a, " * 10_000, "\x1b[31m red \u202e", "🐱", "'s", "of of of and a of", "a " * 20_000 + "of"]
)
def test_whatever_a_prompt_holds_it_is_judged_at_once_and_shown_short(matcher: Matcher, prompt: str) -> None:
    unknown = matcher.unknown(prompt)
    assert unknown is not None and len(unknown.message("it")) < 120 and unknown.message("it").isprintable()


def test_the_embedded_bundle_knows_its_examples_and_names_what_it_does_not_know() -> None:
    bundle = Bundle.load(EMBEDDED)
    assert bundle.vocabulary is not None
    matcher = Matcher(bundle.vocabulary)
    assert not any(map(matcher.unknown, (*bundle.examples, *bundle.vocabulary.objects)))
    assert not any(map(matcher.too_many, (*bundle.examples, *KNOWN)))
    assert not any(map(matcher.unknown_colour, (*bundle.examples, *KNOWN)))
    assert matcher.unknown("A submarine") == Unknown("submarine", ("dolphin", "sailboat"))


@pytest.fixture
def narrow(original: Bundle, folder: Path) -> Bundle:
    """The tiny bundle, which says that it knows cats and foxes."""
    return replace(
        original, vocabulary=Vocabulary({"cat": ("kitten",), "fox": ()}, ("red",), related={"cat": "lynx"}), examples=("a cat",)
    ).save(folder)


@pytest.fixture
def narrow_pipe(narrow: Bundle, fakes: dict[str, FakeEngine]) -> Pipeline:
    return Pipeline(narrow, fakes.__getitem__, "cpu", cache=Cache())


def test_a_result_has_the_warnings_of_its_own_prompts_and_its_images_all_the_same(
    narrow_pipe: Pipeline, pipe: Pipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    result = narrow_pipe.generate(["a kitten", "a red cow", "a red cow", "a cats"], seed=[1, 2, 3, 4])
    assert result.warnings == ("model 'tiny' does not know 'cow'",) and len(result) == 4
    assert [len(one.warnings) for one in result] == [0, 1, 1, 0]
    np.testing.assert_array_equal(result.images, pipe.generate(["a kitten", "a red cow", "a red cow", "a cats"], seed=[1, 2, 3, 4]).images)
    assert narrow_pipe.generate("two lynx").warnings == ("model 'tiny' does not know 'lynx'; nearest: cat",)
    assert narrow_pipe.generate("a fxo").warnings == ("model 'tiny' does not know 'fxo'",)
    assert narrow_pipe.generate("a kittne").warnings == ("model 'tiny' does not know 'kittne'; nearest: cat",)
    assert narrow_pipe.generate("a cat", "a submarine").warnings == () == pipe.generate("a submarine").warnings
    assert capfd.readouterr() == ("", "")


def test_a_number_or_colour_that_it_does_not_know_is_a_warning_in_words(narrow: Bundle, fakes: dict[str, FakeEngine]) -> None:
    bundle = replace(narrow, vocabulary=Vocabulary({"cat": ()}, colours=("red", "blue"), counts=("two", "three")))
    pipe = Pipeline(bundle, fakes.__getitem__, "cpu", cache=Cache())
    assert pipe.warning("a teal cat") == "model 'tiny' does not know the colour 'teal'; it knows red, blue"
    assert pipe.warning("five cats") == "model 'tiny' draws at most three of a thing; 'five' is more"
    assert pipe.warning("three cats") is None and pipe.warning("five cows") == "model 'tiny' does not know 'cows'"


@needs_engine
def test_generate_warns_in_one_line_whatever_it_draws(narrow: Bundle, tmp_path: Path) -> None:
    words = ["generate", "A Red Cow", "--bundle", str(narrow.folder), "--engine", "cpu", "-n", "3", "--seed", "1"]
    result = CliRunner().invoke(main, [*words, "-o", f"{tmp_path}/"])
    line = f"model 'tiny' does not know 'cow'; what it knows: snoopi-rt info --vocabulary {narrow.folder}\n"
    assert (result.exit_code, result.stderr, len(result.stdout.splitlines())) == (0, line, 3)
    result = CliRunner().invoke(main, [*words, "-o", f"{tmp_path}/", "--json"])
    assert [json.loads(row)["warnings"] for row in result.stdout.splitlines()] == [["model 'tiny' does not know 'cow'"]] * 3
    words[1] = "a cat"
    assert CliRunner().invoke(main, [*words, "-o", f"{tmp_path}/"]).stderr == ""


def test_a_batch_lists_its_warnings_and_counts_them(narrow_pipe: Pipeline, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na cow\na fox\na boat\n")
    outcome = Batch(prompts, tmp_path / "out").run(narrow_pipe)
    assert (outcome.drawn, outcome.warned, outcome.warning) == (4, 2, "row 2: model 'tiny' does not know 'cow'")
    assert [json.loads(row).get("warning") for row in (tmp_path / "out" / INDEX).read_text().splitlines()[1:]] == [
        None, "model 'tiny' does not know 'cow'", None, "model 'tiny' does not know 'boat'",
    ]  # fmt: skip
    assert Batch(prompts, tmp_path / "out").run(narrow_pipe).kept == 4


def test_an_answer_over_http_has_its_own_warnings(narrow_pipe: Pipeline) -> None:
    with served(Settings({"tiny": lambda: narrow_pipe})) as address:
        answers = [httpx.post(f"{address}/v1/images/generations", json={"prompt": prompt}).json() for prompt in ("a cow", "a cat")]
        known = httpx.get(f"{address}/v1/models/tiny").json()["vocabulary"]
    assert [answer["warnings"] for answer in answers] == [["model 'tiny' does not know 'cow'"], []]
    assert known["objects"] == {"cat": ["kitten"], "fox": []} and known["related"] is None  # which nobody needs there


def test_info_lists_what_a_bundle_knows(narrow: Bundle, original: Bundle, tmp_path: Path) -> None:
    def info(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["info", *words])
        return result.exit_code, result.output

    assert info(str(narrow.folder), "--vocabulary") == (0, "objects (2): cat (kitten), fox\ncolours (1): red\n")
    known = {
        "objects": {"cat": ["kitten"], "fox": []},
        "colours": ["red"],
        "artifacts": [],
        "styles": [],
        "counts": [],
        "related": {"cat": "lynx"},
    }
    code, line = info(str(narrow.folder), "--vocabulary", "--json")
    assert (code, json.loads(line), line.count("\n")) == (0, known, 1)
    assert info(str(original.folder), "--vocabulary") == (0, "bundle 'tiny' has no vocabulary: its model is not a narrow one\n")
    assert info(str(original.folder), "--vocabulary", "--json") == (0, "null\n")
    code, line = info(str(narrow.folder), "--json")
    document = json.loads(line)
    assert (code, document["vocabulary"], document["hash"], document["sizes"][0]) == (0, known, narrow.hash, [16, 16])
    code, shipped = info("--vocabulary")
    assert code == 0 and shipped.startswith("objects (") and max(map(len, shipped.splitlines())) <= 100
