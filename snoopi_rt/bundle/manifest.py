"""The parts of bundle.json as frozen dataclasses that refuse invalid values. Knows no engine package and no array."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from textwrap import fill
from typing import Literal

from snoopi_rt.engines.base import TensorSpec
from snoopi_rt.errors import BundleError
from snoopi_rt.files import sha256

MANIFEST = "bundle.json"
GRAPHS = ("text_encoder", "generator", "decoder")
MAX_SIDE, MAX_IMAGES, MAX_TOKENS = 2**15, 2**12, 2**17
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


def digits_apart(one: float, other: float) -> int:
    """How many digits, at least two, two numbers need to look different: 0.0501 is beyond 0.05."""
    return next((digits for digits in range(2, 9) if f"{one:.{digits}g}" != f"{other:.{digits}g}"), 2)


def text_rule(prompt: str, lowercase: bool) -> str:
    """The prompt as it is tokenized and looked up: stripped, and lower-cased if the bundle says so.

    As diffusers' T5 pipelines do it; the tokenizers of CLIP and BERT strip prompts themselves.
    """
    return (prompt.lower() if lowercase else prompt).strip()


def legend(names: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each (precision, engine) whose precision needs an explanation."""
    engines: dict[tuple[str, str], list[str]] = {}
    for precision, engine in sorted(set(names)):
        engines.setdefault((precision, meaning(precision, engine)), []).append(engine)
    return [f"{precision} on {', '.join(names)}: {means}" for (precision, means), names in engines.items() if means != precision]


def meaning(precision: str, engine: str) -> str:
    """What a precision means on an engine."""
    if engine in ("cuda", "tensorrt"):
        return f"{precision} arithmetic"
    activations = "bf16" if engine == "openvino" else "fp32"
    return {
        "bf16": "fp16 weights, bf16 arithmetic",
        "fp16": "fp16 weights, fp32 arithmetic",
        "int8": f"int8 matrix products, otherwise {activations}",
        "int8-weights": "int8 weights, fp32 arithmetic",
        "int4-weights": "int4 weights, fp32 arithmetic",
    }.get(precision, precision)


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
    """How a prompt becomes ids: tokenizer.json (None: the bundle draws only the prompts it includes), the largest number of tokens, and
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
class Guidance:
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
    """The prompts whose states the bundle includes, normalized by the text rule, in the order of the .npz file that holds them."""

    file: File
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        require(self.file.path.endswith(".npz"), f"prompts must be in an .npz file, not {self.file.path}")
        require(bool(self.texts) and len(set(self.texts)) == len(self.texts), "a bundle that includes prompts must list each of them, once")


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


@dataclass(frozen=True)
class Parity:
    """The measured error of a graph against PyTorch.

    `latent_error` is the RMS error of the clean latent, whose standard deviation is about 1; `psnr` is that of the image in dB, a finite
    number. None if not measured.
    """

    relative_l2: float
    max_abs: float
    latent_error: float | None = None
    psnr: float | None = None

    def __post_init__(self) -> None:
        require(abs(self.psnr or 0) <= 1000, f"psnr {self.psnr} is not a plausible number of dB")

    @property
    def error(self) -> float:
        """The error that counts: of the latent, or else of the image, RMS relative to full white, or else the relative L2."""
        if self.latent_error is not None:
            return self.latent_error
        return self.relative_l2 if self.psnr is None else 10 ** (-self.psnr / 20)

    @property
    def kind(self) -> str:
        """What that error is called."""
        if self.latent_error is not None:
            return "latent error"
        return "relative L2" if self.psnr is None else "RMS of full white"

    def judged(self, digits: int = 2) -> str:
        """That error and its kind."""
        return f"{self.error:.{digits}g} ({self.kind})"


@dataclass(frozen=True)
class Variant:
    """One variant of a graph: the engines that it is for, and its files, the first of which is opened.

    `tolerance` is the largest error that it was allowed; `max_batch` limits the batch of this variant if it needs that.
    """

    engines: tuple[str, ...]
    precision: str
    format: Literal["onnx", "openvino-ir"]
    files: tuple[File, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: Parity
    tolerance: float
    max_batch: int | None = None

    def __post_init__(self) -> None:
        require(bool(self.engines and self.files and self.inputs and self.outputs), "a variant needs engines, files, inputs and outputs")
        names = [file.path for file in self.files]
        for kind, listed in ("file", names), ("input", [s.name for s in self.inputs]), ("output", [s.name for s in self.outputs]):
            require(len(set(listed)) == len(listed), f"a variant lists the same {kind} twice: {', '.join(listed)}")
        main = Path(names[0])
        if self.format == "onnx":
            require(main.suffix == ".onnx", f"the first file of an onnx variant must be an .onnx file, not {main}")
        else:
            complete = main.suffix == ".xml" and str(main.with_suffix(".bin")) in names
            require(complete, f"an openvino-ir variant must list an .xml file and its .bin, not {', '.join(names)}")
        require_range(f"{main}: max_batch", 1 if self.max_batch is None else self.max_batch, 1, MAX_IMAGES)
        for spec in (*self.inputs, *self.outputs):
            require(
                all(size is None or 0 < size <= INT32 for size in spec.shape), f"{main}: {spec.name} has an impossible shape {spec.shape}"
            )
        within, digits = self.parity.error <= self.tolerance, digits_apart(self.parity.error, self.tolerance)
        require(within, f"{main} is {self.parity.judged(digits)} off PyTorch, beyond its tolerance {self.tolerance:.{digits}g}")

    @cached_property
    def hash(self) -> str:
        """The SHA-256 of this variant's entry in bundle.json, including the hashes of its files."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def check_graph(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        """Raises BundleError unless an opened graph has the inputs and outputs that bundle.json promises, as far as its engine tells."""
        name = self.files[0].path
        for kind, promised, opened in ("input", self.inputs, inputs), ("output", self.outputs, outputs):
            specs = {spec.name: spec for spec in opened}
            known = ", ".join(sorted(spec.name for spec in promised))
            require(
                ", ".join(sorted(specs)) == known, f"{name} has the {kind}s {', '.join(sorted(specs))}, where {MANIFEST} promises {known}"
            )
            for spec in promised:
                other = specs[spec.name]
                fits = len(other.shape) == len(spec.shape) and all(
                    None in sizes or len(set(sizes)) == 1 for sizes in zip(spec.shape, other.shape, strict=True)
                )
                require(
                    fits and other.dtype == spec.dtype,
                    f"{name}: {kind} {spec.name!r} is {other.dtype} {other.shape}, where {MANIFEST} promises {spec.dtype} {spec.shape}",
                )

    def described(self) -> str:
        """A description for people, with its error against PyTorch: first the one that counts, and how large it may be."""
        size, parity = sum(file.size for file in self.files) / 1e6, self.parity
        batch = "" if self.max_batch is None else f", up to {self.max_batch} at once"
        figures = [f"{parity.kind} {parity.error:.2g} of {self.tolerance:.2g} allowed"]
        if parity.kind != "relative L2":
            figures.append(f"relative L2 {parity.relative_l2:.2g}")
        if parity.psnr is not None:
            figures.append(f"PSNR {parity.psnr:.1f} dB")
        return f"{self.precision} for {', '.join(self.engines)} ({self.format}, {size:.1f} MB{batch}), {', '.join(figures)}"
