"""The vocabulary of the embedded model for its bundle.json, and prompts that show the model well."""

from functools import cache
from importlib.resources import files

from snoopi_rt.bundle.bundle import Vocabulary
from snoopi_rt.export.small_model import dataset
from snoopi_rt.export.small_model.dataset.vocabulary import COLOURS, COUNTS, FLAWS, things


def read_related() -> dict[str, str]:
    """The words of related.txt by the thing nearest in meaning."""
    lines = files(dataset).joinpath("related.txt").read_text(encoding="utf-8").splitlines()
    return {thing: words for thing, _, words in (line.partition(": ") for line in lines)}


@cache
def vocabulary() -> Vocabulary:
    """What bundle.json says of the model."""
    objects = {thing.name: thing.synonyms for thing in sorted(things(), key=lambda thing: not thing.common)}  # those asked for most first
    return Vocabulary(
        objects=objects,
        colours=tuple(COLOURS),
        artifacts=tuple(FLAWS),
        styles=("cartoon", "3d render", "flat drawing"),
        counts=tuple(COUNTS.values()),
        # related.txt may lag behind vocabulary.txt: tools/related_words.py, which makes it anew, needs the rest.
        related={thing: words for thing, words in read_related().items() if thing in objects},
    )


EXAMPLES = (
    "a panda on an orange background",
    "a fox",
    "a dragon on a purple background",
    "two cats",
    "a robot on a yellow background",
    "a blue car",
    "a castle on a pink background",
    "a flat drawing of a penguin",
    "a hamburger and french fries",
    "a 3d render of a unicorn on a green background",
)
