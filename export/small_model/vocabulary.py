"""What the embedded model knows, as its bundle.json says it, and prompts that show it well."""

from snoopi_rt.bundle import Vocabulary
from snoopi_rt.export.small_model.dataset.vocabulary import COLOURS, COUNTS, FLAWS, things

_ORDERED = sorted(things(), key=lambda thing: not thing.common)
VOCABULARY = Vocabulary(
    objects={thing.name: thing.synonyms for thing in _ORDERED},
    colours=tuple(COLOURS),
    artifacts=tuple(FLAWS),
    styles=("cartoon", "3d render", "flat drawing"),
    counts=tuple(COUNTS.values()),
)
"""Those things come first that people ask for first."""
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
