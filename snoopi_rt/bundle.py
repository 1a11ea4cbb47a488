"""What an exported folder promises: frozen dataclasses <-> bundle.json, and the check that the folder keeps it.

Knows no engine package and no array. `bundle.json` is written last and whole: a folder that has it is complete.
"""

import hashlib
import json
import re
import stat
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from snoopi_rt.cache import Cache
from snoopi_rt.engines.base import BundleError, InputError, TensorSpec
from snoopi_rt.files import sha256, write_whole
from snoopi_rt.onnx_links import external_data
from snoopi_rt.typed_json import UNSAVED, from_json, to_json

MANIFEST = "bundle.json"
FORMAT = 1
READ_SINCE = "0.1.0"
"""The first snoopi-rt that reads FORMAT: what an older one tells its user to install."""
GRAPHS = ("text_encoder", "generator", "decoder")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BundleError(message)


@dataclass(frozen=True)
class File:
    """One file of the folder: a plain name, its SHA-256 in hexadecimal, its size in bytes."""

    path: str
    sha256: str
    size: int

    def __post_init__(self) -> None:
        plain = PLAIN_NAME.fullmatch(self.path) is not None and self.path != MANIFEST
        _require(plain, f"{self.path!r} is not a plain file name inside the bundle")

    @classmethod
    def of(cls, path: Path) -> "File":
        """The entry for a file as it is on disk now."""
        return cls(path.name, sha256(path), path.stat().st_size)


@dataclass(frozen=True)
class Text:
    """How a prompt becomes ids: the tokenizer.json, the longest prompt in tokens, and whether it is lower-cased first."""

    tokenizer: File
    max_tokens: int
    lowercase: bool


@dataclass(frozen=True)
class Latent:
    """The latent of an image (H, W) has shape (channels, H / factor, W / factor)."""

    channels: int
    factor: int


@dataclass(frozen=True)
class Scale:
    """The range of a guidance scale and the value used where none is given."""

    default: float
    min: float
    max: float

    def __post_init__(self) -> None:
        _require(self.min <= self.default <= self.max, f"scale {self.default} is outside {self.min} to {self.max}")


@dataclass(frozen=True)
class Guidance:
    """How the generator uses a negative prompt; `fixed` holds the constants of that kind that are in the graph."""

    kind: Literal["nasa", "nag", "vsf", "projected", "none"]
    scale: Scale
    fixed: dict[str, float]


@dataclass(frozen=True)
class Parity:
    """The measured distance of a graph from PyTorch's answer."""

    relative_l2: float
    max_abs: float


@dataclass(frozen=True)
class Build:
    """One form of a graph: the engines that it suits and its files, the first of which is the one to open."""

    engines: tuple[str, ...]
    precision: str
    format: Literal["onnx", "openvino-ir"]
    files: tuple[File, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: Parity
    tolerance: float

    def __post_init__(self) -> None:
        _require(bool(self.engines and self.files and self.inputs and self.outputs), "a build needs engines, files, inputs and outputs")
        names = [file.path for file in self.files]
        for what, given in ("file", names), ("input", [s.name for s in self.inputs]), ("output", [s.name for s in self.outputs]):
            _require(len(set(given)) == len(given), f"a build lists one {what} twice: {', '.join(given)}")
        main = Path(names[0])
        if self.format == "onnx":
            _require(main.suffix == ".onnx", f"the first file of an onnx build must be an .onnx file, not {main}")
        else:
            complete = main.suffix == ".xml" and str(main.with_suffix(".bin")) in names
            _require(complete, f"an openvino-ir build must list an .xml file and its .bin, not {', '.join(names)}")
        within = self.parity.relative_l2 <= self.tolerance
        _require(within, f"{main} is {self.parity.relative_l2} off PyTorch, beyond its tolerance {self.tolerance}")

    @cached_property
    def hash(self) -> str:
        """The SHA-256 of everything said about this build, its files' hashes included."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Bundle:
    """A whole bundle. `folder` and `hash` (SHA-256 of bundle.json) are known once it is on disk."""

    name: str
    backbone: str
    licence: str
    text: Text
    latent: Latent
    sizes: tuple[tuple[int, int], ...]
    max_batch: int
    guidance: Guidance
    provenance: dict[str, str]
    graphs: dict[str, tuple[Build, ...]]
    folder: Path = field(default=Path(), metadata=UNSAVED)
    hash: str = field(default="", metadata=UNSAVED)

    def __post_init__(self) -> None:
        _require(set(self.graphs) == set(GRAPHS), f"the graphs must be {', '.join(GRAPHS)}, not {', '.join(self.graphs) or 'none'}")
        _require(all(self.graphs.values()), "every graph needs a build")
        positive = min(self.latent.channels, self.latent.factor, self.text.max_tokens, self.max_batch) > 0
        _require(positive, "channels, factor, max_tokens and max_batch must be positive")
        fitting = all(side > 0 and side % self.latent.factor == 0 for size in self.sizes for side in size)
        _require(bool(self.sizes) and fitting, f"every size must be a multiple of {self.latent.factor}")
        seen: dict[str, File] = {}
        for file in self._listed():
            _require(seen.setdefault(file.path, file) == file, f"{file.path} is listed twice with different contents")

    @classmethod
    def load(cls, folder: str | Path, cache: Cache | None = None) -> "Bundle":
        """The bundle in the folder, its files checked; hashes that the cache knows for (size, mtime, inode) are trusted.

        Raises BundleError for anything that is not as promised.
        """
        folder = Path(folder)
        data = _read_manifest(folder)
        try:
            bundle = replace(from_json(cls, _document(data)), folder=folder, hash=hashlib.sha256(data).hexdigest())
        except (BundleError, ValueError) as error:
            raise BundleError(f"{folder / MANIFEST}: {error}") from None
        bundle._check_files(Cache() if cache is None else cache)
        return bundle

    def save(self, folder: str | Path) -> "Bundle":
        """Checks the files, writes bundle.json beside them, returns the bundle as `load` sees it. Raises BundleError."""
        bundle = replace(self, folder=Path(folder))
        bundle._check_files(None)
        document = {"format": FORMAT, "snoopi_rt": READ_SINCE, **to_json(self)}
        try:
            write_whole(bundle.folder / MANIFEST, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode(), durable=True)
        except (OSError, ValueError) as error:
            raise BundleError(f"cannot write {bundle.folder / MANIFEST}: {error}") from error
        return Bundle.load(folder)

    def verify(self) -> None:
        """Hashes every file again, whatever the cache knows. Raises BundleError."""
        self._check_files(None)

    def engines(self) -> tuple[str, ...]:
        """The engines that have a build of every graph."""
        sets = [{engine for build in builds for engine in build.engines} for builds in self.graphs.values()]
        return tuple(sorted(set.intersection(*sets)))

    def build(self, graph: str, engine: str, precision: str | None = None) -> Build:
        """The graph's build for the engine: the one in that precision, else the first.

        Graphs have their own precisions, so one graph may lack it: raises InputError only where no graph has it for this engine,
        and BundleError where the graph has no build for the engine at all.
        """
        suiting = [build for build in self.graphs[graph] if engine in build.engines]
        if not suiting:
            raise BundleError(f"bundle {self.name!r} has no {graph} for engine {engine!r}, it serves {', '.join(self.engines()) or 'none'}")
        precisions = {build.precision for builds in self.graphs.values() for build in builds if engine in build.engines}
        if precision is not None and precision not in precisions:
            raise InputError(
                f"bundle {self.name!r} has no precision {precision!r} for engine {engine!r}, choose from {', '.join(sorted(precisions))}"
            )
        return next((build for build in suiting if build.precision == precision), suiting[0])

    def described(self) -> str:
        """What the bundle holds, as lines for people."""
        scale = self.guidance.scale
        lines = [
            f"{self.name}: backbone {self.backbone}, licence {self.licence}",
            f"sizes {', '.join(f'{height}x{width}' for height, width in self.sizes)}, batch up to {self.max_batch}",
            f"prompts up to {self.text.max_tokens} tokens",
            f"guidance {self.guidance.kind}, scale {scale.min} to {scale.max}, default {scale.default}",
        ]
        for graph, builds in self.graphs.items():
            for build in builds:
                size = sum(file.size for file in build.files) / 1e6
                measured = f"relative L2 to PyTorch {build.parity.relative_l2:.1e} (at most {build.tolerance:.0e})"
                files = f"{build.format} for {', '.join(build.engines)}, {size:.1f} MB"
                lines.append(f"{graph}: {files}, {build.precision} arithmetic, {measured}")
        lines += [f"{key}: {value}" for key, value in self.provenance.items()]
        return "\n".join([*lines, f"hash {self.hash}"])

    def _listed(self) -> list[File]:
        return [self.text.tokenizer, *(file for builds in self.graphs.values() for build in builds for file in build.files)]

    def _check_files(self, cache: Cache | None) -> None:
        external = {file.path: _check_file(self.folder, file, cache) for file in dict.fromkeys(self._listed())}
        for build in (build for builds in self.graphs.values() for build in builds):
            listed = {file.path for file in build.files}
            for name in external[build.files[0].path]:
                _require(name in listed, f"{self.folder / build.files[0].path} reads {name!r}, which its build does not list")


def _read_manifest(folder: Path) -> bytes:
    path = folder / MANIFEST
    _require(folder.is_dir(), f"no bundle at {folder}: no such folder")
    _require(path.exists(), f"no bundle at {folder}: it has no {MANIFEST}")
    _require(not path.is_symlink(), f"{path} is a symbolic link")
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error


def _document(data: bytes) -> dict[str, Any]:
    """The document without its two keys about the format. Raises ValueError (no JSON) or BundleError (no format of this version)."""
    document = json.loads(data)
    _require(isinstance(document, dict), "not a JSON object")
    number, since = document.pop("format", None), document.pop("snoopi_rt", None)
    if type(number) is int and number > FORMAT:
        raise BundleError(f'format {number} is newer than this snoopi-rt, which reads {FORMAT}: pip install "snoopi-rt>={since}"')
    _require(number == FORMAT and type(number) is int, f"unknown format {number!r}, this snoopi-rt reads {FORMAT}")
    return document


def _check_file(folder: Path, file: File, cache: Cache | None) -> list[str]:
    """The external data that the file names. Raises BundleError where it is not the file that was promised."""
    path = folder / file.path
    try:
        status = path.lstat()
        _require(not stat.S_ISLNK(status.st_mode), f"{path} is a symbolic link, which a bundle may not hold")
        _require(stat.S_ISREG(status.st_mode), f"{path} is not a file")
        _require(status.st_size == file.size, f"{path} is damaged: {status.st_size} bytes instead of {file.size}")
        key = f"{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}-{file.sha256}.json"
        if cache is not None and (record := _record(cache.read("hashes", key))) is not None:
            return record
        _require(sha256(path) == file.sha256, f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")
        external = external_data(path) if path.suffix == ".onnx" else []
        if cache is not None:
            cache.write("hashes", key, json.dumps(external).encode())
    except FileNotFoundError:
        raise BundleError(f"{path} is missing") from None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    return external


def _record(data: bytes | None) -> list[str] | None:
    """The external data noted with a verified hash; None where nothing is noted, or the note is damaged."""
    try:
        names = json.loads(data or b"null")
    except ValueError:
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
