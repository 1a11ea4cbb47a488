"""The parts of bundle.json as frozen dataclasses that refuse invalid values. Knows no engine package and no array."""

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from snoopi_rt.errors import BundleError
from snoopi_rt.files import sha256

MANIFEST = "bundle.json"
GRAPHS = ("text_encoder", "generator", "decoder")
MAX_SIDE, MAX_BATCH, MAX_TOKENS = 2**15, 2**12, 2**17
"""Pixels of a side of an image, images of a batch, tokens of a prompt."""
INT32, INT64 = 2**31 - 1, 2**63 - 1
HASH = re.compile("[0-9a-f]{64}")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def require(condition: bool, message: str) -> None:
    """Raises BundleError with the message unless the condition holds."""
    if not condition:
        raise BundleError(message)


def require_range(name: str, value: int, low: int, high: int) -> None:
    """Raises BundleError for an integer outside the range: it makes no sense, and would overflow elsewhere."""
    require(low <= value <= high, f"{name} must be {'positive and at most' if low == 1 else f'from {low} to'} {high}, got {value}")


def text_rule(prompt: str, lowercase: bool) -> str:
    """The prompt as it is tokenized and looked up: stripped, and lower-cased if the bundle says so.

    As diffusers' T5 pipelines do it; the tokenizers of CLIP and BERT strip prompts themselves.
    """
    return (prompt.lower() if lowercase else prompt).strip()


@dataclass(frozen=True)
class File:
    """A file of the folder: its plain name, its SHA-256 in hexadecimal, its size in bytes."""

    path: str
    sha256: str
    size: int

    def __post_init__(self) -> None:
        plain = PLAIN_NAME.fullmatch(self.path) is not None and self.path != MANIFEST
        require(plain, f"{self.path!r} is not a plain file name inside the bundle")
        # Cache entries are named after it.
        require(HASH.fullmatch(self.sha256) is not None, f"{self.path}: {self.sha256!r} is not a SHA-256 in hexadecimal")
        require_range(f"the size of {self.path}", self.size, 0, INT64)

    @classmethod
    def of(cls, path: Path) -> "File":
        """The entry of a file as it is on disk."""
        return cls(path.name, sha256(path), path.stat().st_size)


@dataclass(frozen=True)
class Instruction:
    """A text that is put before every prompt, and how many of the ids at its start the graph `text_encoder` knows by itself.

    Of those ids the graph is given the first alone; all prompts must begin with them.
    """

    text: str
    tokens: int

    def __post_init__(self) -> None:
        require_range("the tokens of the instruction", self.tokens, 1, MAX_TOKENS)


@dataclass(frozen=True)
class Text:
    """How a prompt becomes ids: tokenizer.json (None: the bundle draws only stored prompts), the largest number of tokens, and
    whether prompts are lower-cased first. `pad`: the id that pads every prompt to that length, as CLIP needs; None pads nothing.
    `instruction`: what a language model is told before every prompt; None: nothing.
    """

    tokenizer: File | None
    max_tokens: int
    lowercase: bool
    pad: int | None = None
    instruction: Instruction | None = None

    def __post_init__(self) -> None:
        require_range("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        require_range("pad", self.pad or 0, 0, INT32)


@dataclass(frozen=True)
class Latent:
    """The latent of an image (H, W) has shape (channels, H / factor, W / factor)."""

    channels: int
    factor: int

    def __post_init__(self) -> None:
        require_range("channels", self.channels, 1, 2**12)
        require_range("factor", self.factor, 1, 2**10)


@dataclass(frozen=True)
class Tile:
    """Latents larger than `size` pixels are decoded in tiles of that size that overlap by `overlap` pixels, which bounds the memory."""

    size: int
    overlap: int

    def __post_init__(self) -> None:
        require_range("the size of a tile", self.size, 1, MAX_SIDE)
        require(0 <= self.overlap < self.size, f"tiles of {self.size} latent pixels cannot overlap by {self.overlap}")


@dataclass(frozen=True)
class Scale:
    """The range of a guidance scale, and its default."""

    default: float
    min: float
    max: float

    def __post_init__(self) -> None:
        require(self.min <= self.default <= self.max, f"scale {self.default} is outside {self.min} to {self.max}")


@dataclass(frozen=True)
class GuidancePromise:
    """How the generator uses a negative prompt; `fixed` holds the constants of that kind, which are part of the graph.

    `kind` is "none" for a generator that takes no negative prompt; every other name is for people, because the formula is in the graph.
    """

    kind: str
    scale: Scale
    fixed: dict[str, float]

    def __post_init__(self) -> None:
        require(PLAIN_NAME.fullmatch(self.kind) is not None, f"the guidance {self.kind!r} is not a plain name")


@dataclass(frozen=True)
class Prompts:
    """The prompts whose states are stored in the bundle, normalized by the text rule, in the order of the .npz file that holds them."""

    file: File
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        require(self.file.path.endswith(".npz"), f"prompts must be in an .npz file, not {self.file.path}")
        require(bool(self.texts) and len(set(self.texts)) == len(self.texts), "a bundle with stored prompts must list each of them, once")


@dataclass(frozen=True)
class Vocabulary:
    """What a narrow model can draw: objects with their synonyms, colours, artifacts, styles and counts ("two").

    related: by object, words separated by spaces that the model does not know and whose meaning is closest to that object.
    """

    objects: dict[str, tuple[str, ...]]
    colours: tuple[str, ...] = ()
    artifacts: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    related: dict[str, str] | None = None

    def __post_init__(self) -> None:
        require(bool(self.objects), "a vocabulary needs objects")
        for name in self.related or ():
            require(name in self.objects, f"words are related to {name!r}, which is not an object of the vocabulary")
        words = (*self.objects, *(word for synonyms in self.objects.values() for word in synonyms))
        for kind in (words, self.colours, self.artifacts, self.styles, self.counts):
            require(all(word == word.strip() != "" for word in kind), "a word of the vocabulary is empty or not stripped")

    def described(self) -> str:
        """A listing for people; synonyms are in brackets."""
        objects = [f"{name} ({', '.join(synonyms)})" if synonyms else name for name, synonyms in self.objects.items()]
        kinds = {"objects": objects, "colours": self.colours, "artifacts": self.artifacts, "styles": self.styles, "counts": self.counts}
        lines = (f"{kind} ({len(words)}): {', '.join(words)}" for kind, words in kinds.items() if words)
        return "\n".join(fill(line, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) for line in lines)
