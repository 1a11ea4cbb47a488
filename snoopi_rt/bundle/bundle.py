"""A bundle: what bundle.json promises as frozen dataclasses, and the checks that its folder keeps those promises.

Knows no engine package and no array. `bundle.json` is written last and atomically: a folder that has it is complete.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from snoopi_rt.bundle.compatibility import check_shapes, check_tokens
from snoopi_rt.bundle.manifest import (
    GRAPHS,
    MANIFEST,
    MAX_BATCH,
    MAX_SIDE,
    File,
    GuidancePromise,
    Instruction,
    Latent,
    Prompts,
    Scale,
    Text,
    Tile,
    Vocabulary,
    require,
    require_range,
    text_rule,
)
from snoopi_rt.bundle.tokenizer import Tokenizer
from snoopi_rt.bundle.typed_json import UNSAVED, from_json, to_json
from snoopi_rt.bundle.variant import Parity, Variant, legend
from snoopi_rt.bundle.verify import Stamp, check_file, read_manifest, remember_folder, stamp
from snoopi_rt.cache import Cache
from snoopi_rt.engines import variant_names
from snoopi_rt.errors import BundleError, InputError, how_to_install
from snoopi_rt.files import write_whole
from snoopi_rt.json_reader import parse_json
from snoopi_rt.shell import quote, visible

__all__ = [
    "GRAPHS",
    "MANIFEST",
    "Bundle",
    "File",
    "GuidancePromise",
    "Instruction",
    "Latent",
    "Parity",
    "Prompts",
    "Scale",
    "Text",
    "Tile",
    "Variant",
    "Vocabulary",
]

FORMATS = (1, 2)
"""Format 2 is format 1 with the optional keys NEW; the last one is written."""
NEW = ("vocabulary", "examples")
READ_SINCE = "0.1.0"
"""The first snoopi-rt that reads the last format: what an older one tells its users to install."""

TEXT_ENGINE = "cpu"
"""Runs a text encoder that has no variant for the engine of the other graphs."""


@dataclass(frozen=True, repr=False)
class Bundle:
    """A bundle. `folder` and `hash` (SHA-256 of bundle.json) are set once it is on disk.

    The graph `text_encoder` and the tokenizer may be missing if the states that the generator needs are stored in `prompts`. For people:
    `vocabulary` lists what a narrow model can draw, None means anything; `examples` are prompts that show the model well.
    """

    name: str
    backbone: str
    licence: str
    text: Text
    latent: Latent
    sizes: tuple[tuple[int, int], ...]
    max_batch: int
    guidance: GuidancePromise
    provenance: dict[str, str]
    graphs: dict[str, tuple[Variant, ...]]
    prompts: Prompts | None = None
    tile: Tile | None = None
    vocabulary: Vocabulary | None = None
    examples: tuple[str, ...] = ()
    folder: Path = field(default=Path(), metadata=UNSAVED)
    hash: str = field(default="", metadata=UNSAVED)
    stamps: dict[str, Stamp | None] = field(default_factory=dict, metadata=UNSAVED, compare=False)

    def __post_init__(self) -> None:
        encoding = "text_encoder" in self.graphs or self.prompts is None
        needed = GRAPHS if encoding else GRAPHS[1:]
        require(set(self.graphs) == set(needed), f"the graphs must be {', '.join(needed)}, not {', '.join(self.graphs) or 'none'}")
        require(encoding == (self.text.tokenizer is not None), "a bundle has a text_encoder and a tokenizer, or neither and prompts")
        require(all(self.graphs.values()), "every graph needs a variant")
        require_range("max_batch", self.max_batch, 1, MAX_BATCH)
        for side in (side for size in self.sizes for side in size):
            require_range("a side of a size", side, 0, MAX_SIDE)
        fitting = all(side > 0 and side % self.latent.factor == 0 for size in self.sizes for side in size)
        require(bool(self.sizes) and fitting, f"every size must be a multiple of {self.latent.factor}")
        for text in self.prompts.texts if self.prompts else ():
            require(text == text_rule(text, self.text.lowercase) != "", f"the prompt {text!r} is not normalized by the text rule")
        for text in self.examples:
            known = encoding or text_rule(text, self.text.lowercase) in (self.prompts.texts if self.prompts else ())
            require(bool(text.strip()) and known, f"the example {text!r} is no prompt of this bundle")
        check_shapes(self.graphs, self.text, self.latent, self.sizes, self.tile)
        seen: dict[str, File] = {}
        for file in self._listed():
            require(seen.setdefault(file.path, file) == file, f"{file.path} is listed twice with different contents")

    def __repr__(self) -> str:
        facts = [repr(self.name), f"backbone {self.backbone}", ", ".join(f"{width}x{height}" for height, width in self.sizes)]
        facts += [f"guidance {self.guidance.kind}", f"for {', '.join(self.engines())}"]
        return f"<Bundle: {', '.join(facts)}, in {str(self.folder)!r}>"

    @classmethod
    def load(cls, folder: str | Path, cache: Cache | None = None) -> "Bundle":
        """The bundle in the folder, its files verified; hashes that the cache has for a file's size, times and inode are trusted.

        Raises BundleError if anything is not as bundle.json promises.
        """
        cache = Cache() if cache is None else cache
        bundle = cls._read(Path(folder), cache)
        remember_folder(bundle.folder, bundle.hash, cache)
        return bundle

    def save(self, folder: str | Path) -> "Bundle":
        """Checks the files and writes bundle.json beside them; returns the bundle as `load` reads it. Raises BundleError."""
        bundle = replace(self, folder=Path(folder))
        bundle._check_files(Cache())
        document = {"format": FORMATS[-1], "snoopi_rt": READ_SINCE, **to_json(self)}
        try:
            write_whole(bundle.folder / MANIFEST, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode(), durable=True)
        except (OSError, ValueError) as error:
            raise BundleError(f"cannot write {bundle.folder / MANIFEST}: {error}") from error
        return self._read(bundle.folder, Cache())

    def check(self) -> None:
        """Raises BundleError unless the files are still those that bundle.json promises; hashes in the cache are trusted."""
        self._check_files(Cache())

    def verify(self) -> None:
        """Hashes every file again, whatever the cache contains. Raises BundleError."""
        self._check_files(None)

    def check_again(self, files: Iterable[File]) -> None:
        """Raises BundleError unless the files, which are about to be opened or have just been, are still those of the bundle.

        Only files that changed since the last check are hashed.
        """
        for file in files:
            if self.stamps.get(file.path) != stamp(self.folder / file.path):
                self._check_file(file, None)

    def engines(self) -> tuple[str, ...]:
        """The engines that can run every graph, see `variants`."""
        names = {engine for variant in self._all_variants() for engine in variant.engines}
        return tuple(sorted(engine for engine in names if all(self.variants(graph, engine) for graph in self.graphs)))

    def variants(self, graph: str, engine: str) -> tuple[Variant, ...]:
        """The graph's variants for the engine; a text encoder that has none runs on `cpu`, since it runs only once per prompt."""
        names = variant_names(engine)
        for name in (*names, TEXT_ENGINE) if graph == "text_encoder" else names:
            if suitable := tuple(variant for variant in self.graphs[graph] if name in variant.engines):
                return suitable
        return ()

    def variant(self, graph: str, engine: str, precision: str | None = None) -> Variant:
        """The graph's variant for the engine, in that precision or by default the first.

        Raises BundleError if the graph has no variant for the engine, InputError if it has none in that precision.
        """
        suitable = self.variants(graph, engine)
        if not suitable:
            raise BundleError(
                f"bundle {self.name!r} has no {graph} for engine {engine!r}, it supports {', '.join(self.engines()) or 'none'}"
            )
        variant = next((variant for variant in suitable if precision in (None, variant.precision)), None)
        if variant is None:
            known = ", ".join(variant.precision for variant in suitable)
            raise InputError(f"bundle {self.name!r} has no {graph} in precision {precision!r} for engine {engine!r}, choose from {known}")
        return variant

    def open_tokenizer(self) -> Tokenizer:
        """The tokenizer with the bundle's text rule. Raises BundleError if its file changed, or if the bundle has stored prompts only."""
        if self.text.tokenizer is None:
            raise BundleError(f"bundle {self.name!r} has no tokenizer")
        self.check_again([self.text.tokenizer])
        return Tokenizer.of(self.folder / self.text.tokenizer.path, self.text)

    def described(self, graphs: bool = True) -> str:
        """A description for people, in several lines; graphs: whether it lists their variants."""
        scale = self.guidance.scale
        lines = [
            f"{self.name}: backbone {self.backbone}, licence {self.licence}",
            f"sizes {', '.join(f'{width}x{height}' for height, width in self.sizes)}, up to {self.max_batch} images at once",
            f"prompts of up to {self.text.max_tokens} tokens",
            f"guidance {self.guidance.kind}, negative scale {scale.min:g} to {scale.max:g}, by default {scale.default:g}",
        ]
        if self.prompts is not None:
            only = "" if "text_encoder" in self.graphs else ", and no text encoder for others"
            lines[2] += f", with the states of {len(self.prompts.texts)} stored{only}"
        if self.vocabulary is not None:
            lines.append(f"draws {len(self.vocabulary.objects)} objects: --vocabulary lists them")
        if self.examples:
            lines.append(f"examples: {', '.join(map(quote, self.examples))}")
        if self.tile is not None:
            side, overlap = self.tile.size * self.latent.factor, self.tile.overlap * self.latent.factor
            lines[1] += f", decoded in tiles of {side}x{side} that overlap by {overlap} pixels"
        if graphs:
            lines += [f"{graph}: {variant.described()}" for graph, variants in self.graphs.items() for variant in variants]
        lines += legend((variant.precision, engine) for variant in self._all_variants() for engine in variant.engines)
        lines += [f"{key}: {value}" for key, value in self.provenance.items()]
        return "\n".join(map(visible, [*lines, f"hash {self.hash}"]))

    @classmethod
    def _read(cls, folder: Path, cache: Cache) -> "Bundle":
        data = read_manifest(folder)
        try:
            bundle = replace(from_json(cls, _document(data)), folder=folder, hash=hashlib.sha256(data).hexdigest())
        except (BundleError, ValueError) as error:
            raise BundleError(f"{folder / MANIFEST}: {error}") from None
        bundle._check_files(cache)
        return bundle

    def _all_variants(self) -> Iterator[Variant]:
        """All variants of all graphs."""
        return chain.from_iterable(self.graphs.values())

    def _listed(self) -> list[File]:
        others = [self.text.tokenizer, self.prompts.file if self.prompts else None]
        models = [file for variant in self._all_variants() for file in variant.files]
        return [*(file for file in others if file is not None), *models]

    def _check_files(self, cache: Cache | None) -> None:
        external = {file.path: self._check_file(file, cache) for file in dict.fromkeys(self._listed())}
        for variant in self._all_variants():
            listed = {file.path for file in variant.files}
            for name in external[variant.files[0].path]:
                require(name in listed, f"{self.folder / variant.files[0].path} reads {name!r}, which its variant does not list")
        check_tokens(self.folder, self.graphs, self.text, cache)

    def _check_file(self, file: File, cache: Cache | None) -> list[str]:
        before = stamp(self.folder / file.path)
        external = check_file(self.folder, file, cache)
        self.stamps[file.path] = before
        return external


def _document(data: bytes) -> dict[str, Any]:
    """The document without its two keys about the format. Raises ValueError for invalid JSON, BundleError for an unknown format."""
    document = parse_json(data)
    require(isinstance(document, dict), "not a JSON object")
    number, since = document.pop("format", None), document.pop("snoopi_rt", None)
    formats = " and ".join(map(str, FORMATS))
    if type(number) is int and number > FORMATS[-1]:
        raise BundleError(
            f"format {number} is newer than this snoopi-rt, which reads {formats}; {since} does: git pull, then {how_to_install()}"
        )
    require(type(number) is int and number in FORMATS, f"unknown format {number!r}, this snoopi-rt reads {formats}")
    if number == 1 and (newer := [key for key in NEW if key in document]):
        raise BundleError(f"unknown key {newer[0]} in format 1")
    return document
