"""The words that the embedded model knows: things with their names, colours, flaws, styles and counts."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Thing:
    """A thing to draw: its usual name, its other names, and the names that icon sets give its emoji."""

    name: str
    icons: tuple[str, ...]
    synonyms: tuple[str, ...]
    group: str
    common: bool

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.synonyms)


@cache
def things() -> tuple[Thing, ...]:
    """All things of vocabulary.txt, in its order."""
    rows = []
    for group, lines in _sections().items():
        if group == NO_ARTICLE:
            continue
        for line in lines:
            name, _, rest = line.removeprefix("+ ").partition(":")
            icons, *synonyms = (part.strip() for part in rest.split(","))
            rows.append(Thing(name.strip(), tuple(icons.split("|")), tuple(synonyms), group, line.startswith("+ ")))
    return tuple(rows)


@cache
def without_article() -> frozenset[str]:
    """Names that are plural or uncountable: "grapes", "fire"."""
    return frozenset(name.strip() for line in _sections()[NO_ARTICLE] for name in line.split(","))


NO_ARTICLE = "no article"


@cache
def _sections() -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in files(__package__).joinpath("vocabulary.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = sections.setdefault(line.strip("[]"), [])
        elif line.strip() and not line.startswith("#"):
            lines.append(line)
    return sections


COLOURS = {
    "red": (214, 40, 44),
    "orange": (246, 140, 36),
    "yellow": (250, 216, 60),
    "green": (58, 166, 72),
    "blue": (48, 104, 218),
    "purple": (136, 68, 188),
    "pink": (250, 152, 198),
    "brown": (122, 80, 48),
    "black": (18, 18, 20),
    "white": (260, 260, 260),
    "gray": (142, 142, 146),
}
"""RGB of a background of each colour; white lies above 255, so that a slightly darker shade of it is still white."""
COLOUR_SYNONYMS = {"gray": ("grey",), "purple": ("violet",)}
NEUTRAL = ("black", "white", "gray")
"""The colours that remain true in a grayscale picture."""
DEFAULT_BACKGROUND = "white"

FLAWS = {
    "blurry": ("blurred", "out of focus"),
    "pixelated": ("pixellated",),
    "grayscale": ("greyscale", "black and white", "monochrome"),
    "grainy": ("noisy",),
}
"""Flaws with their other names."""

COUNTS = {2: "two", 3: "three"}
SIZES = {"small": ("tiny", "little"), "big": ("large", "huge")}

_PLURALS = {
    "mouse": "mice",
    "wolf": "wolves",
    "leaf": "leaves",
    "sheep": "sheep",
    "fish": "fish",
    "deer": "deer",
    "man": "men",
    "woman": "women",
}
_PLURALS |= {
    "octopus": "octopuses",
    "piano": "pianos",
    "tooth": "teeth",
    "hippo": "hippos",
    "rhino": "rhinos",
    "ufo": "ufos",
    "photo": "photos",
}


def plural(name: str) -> str:
    """A name with its last word in the plural, `cats`, `cherries`, `old men`; a name without an article stays as it is."""
    if name in without_article():
        return name
    rest, _, word = name.rpartition(" ")
    if word in _PLURALS:
        word = _PLURALS[word]
    elif word.endswith("man"):
        word = f"{word[:-2]}en"
    elif word.endswith(("s", "x", "ch", "sh")) or (
        word.endswith("o") and word in ("tomato", "potato", "hero", "superhero", "volcano", "tornado")
    ):
        word += "es"
    elif word.endswith("y") and word[-2] not in "aeiou":
        word = f"{word[:-1]}ies"
    else:
        word += "s"
    return f"{rest} {word}".strip()


def with_article(words: str) -> str:
    """The words with their article, `an apple`, `a cat`, `a ufo`, `cherries`."""
    if words in without_article():
        return words
    vowel = (words[0] in "aeio" or words.startswith(("um", "ugl", "hour"))) and not words.startswith("one")
    return f"{'an' if vowel else 'a'} {words}"
