"""What the small model has learned, as its bundle.json says it: the words of its captions, and prompts that show it well."""

from snoopi_rt.bundle.bundle import Vocabulary
from snoopi_rt.export.training.small.concepts import CONCEPTS
from snoopi_rt.export.training.small.emoji import BACKGROUNDS, DRAWINGS, QUALITIES

VOCABULARY = Vocabulary(
    objects={concept.name: concept.aliases for concept in CONCEPTS},
    colours=tuple(BACKGROUNDS),
    artifacts=QUALITIES,
    styles=tuple(drawing.style for drawing in DRAWINGS),
)
EXAMPLES = (
    "a panda on an orange background",
    "a fox on a blue background",
    "a rocket on a purple background",
    "a hamburger on a red background",
    "a sunflower on a black background",
    "a cactus on a yellow background",
    "a watermelon on a blue background",
    "a flat drawing of a penguin on a yellow background",
)
