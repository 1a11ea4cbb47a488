"""Many prompts of a file to images in a folder: in constant memory, resumed after a kill, with an index of what became of each row."""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from snoopi_rt import image
from snoopi_rt.engines.base import EngineMissing, InputError, OutputError
from snoopi_rt.pipeline import JOB, Pipeline, columns
from snoopi_rt.request import SEEDS

INDEX = "index.jsonl"
KINDS = (".txt", ".jsonl", ".csv", ".parquet")
Row = tuple[int, dict[str, Any] | str]
"""A row's number, from 1, and its job, or what is wrong with it."""


@dataclass
class Outcome:
    """How many rows were drawn now, were there before, and failed."""

    drawn: int = 0
    kept: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Batch:
    """What is drawn from a file: row i with seed + i - 1 unless it has its own; negative and scale where a row has none."""

    prompts: Path
    out: Path
    seed: int = 0
    negative: str | None = None
    scale: float | None = None
    size: tuple[int, int] | None = None
    truncate: bool = False
    format: str = "png"

    def run(self, pipe: Pipeline, progress: Callable[[int], None] = lambda rows: None) -> Outcome:
        """Draws what is not there yet; progress(rows) after each few.

        Raises InputError for a file that cannot be read and a folder that holds another batch, OutputError where a picture cannot be
        made or written. A row that cannot be drawn is listed in the index with its reason, and the rest is done.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        index, outcome = _Index(self.out / INDEX, self._identity(pipe)), Outcome()
        with index:
            rows = iter(read_rows(self.prompts))
            while together := list(islice(rows, pipe.max_batch)):
                wanted = []
                for number, job in together:
                    path = self._path(number)
                    if path.exists():
                        outcome.kept += 1
                        index.found(number, path)
                    elif isinstance(job, str):
                        outcome.failed += 1
                        index.add(number, {"error": job})
                    else:
                        wanted.append((number, path, job))
                self._draw(pipe, wanted, index, outcome)
                progress(len(together))
        return outcome

    def _draw(self, pipe: Pipeline, wanted: list[tuple[int, Path, dict[str, Any]]], index: "_Index", outcome: Outcome) -> None:
        """Draws some rows in one call; where one of them cannot be, each by itself."""
        if not wanted:
            return
        jobs = [self._job(number, job) for number, _, job in wanted]
        try:
            results = pipe.generate(**columns(jobs), size=self.size, truncate=self.truncate).split()
        except InputError as error:
            if len(wanted) > 1:
                for each in wanted:
                    self._draw(pipe, [each], index, outcome)
                return
            outcome.failed += 1
            index.add(wanted[0][0], {"error": str(error)})
            return
        for (number, path, _), result in zip(wanted, results, strict=True):
            image.save(result.images[0], path, result.metadata(0))
            index.drawn(number, path, result.metadata(0))
            outcome.drawn += 1

    def _job(self, number: int, job: dict[str, Any]) -> dict[str, Any]:
        negative = job.get("negative_prompt", self.negative)
        scale = job.get("negative_scale", None if negative is None else self.scale)
        seed = job.get("seed", (self.seed + number - 1) % SEEDS)
        return {"prompt": job["prompt"], "negative_prompt": negative, "negative_scale": scale, "seed": seed}

    def _path(self, number: int) -> Path:
        return self.out / f"{number:06}.{self.format}"

    def _identity(self, pipe: Pipeline) -> dict[str, Any]:
        with open(self.prompts, "rb") as file:
            prompts = hashlib.file_digest(file, "sha256").hexdigest()
        settings = [self.seed, self.negative, self.scale, self.size, self.truncate, self.format]
        return {"batch": 1, "bundle_hash": pipe.bundle.hash, "prompts": prompts, "settings": settings}


class _Index:
    """A line of JSON a row, the first says what batch it is. A line that a kill cut short is written again."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path = path
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        try:
            records = [json.loads(line) for line in lines]
        except ValueError as error:
            raise InputError(f"{path} is not an index of snoopi-rt") from error
        if records and records[0] != json.loads(json.dumps(identity)):
            raise InputError(f"{path.parent} holds another batch (other prompts, bundle or settings): choose another folder")
        # What failed, and what is not there any more, is drawn again.
        files = {
            record["row"]: (path.parent / record["file"], line) for line, record in zip(lines, records, strict=True) if "file" in record
        }
        there = {number: line for number, (file, line) in files.items() if file.is_file()}
        self._known = set(there)
        self._start = [json.dumps(identity).encode(), *there.values()]

    def __enter__(self) -> None:
        beside = self._path.with_name(f".{self._path.name}.part")
        beside.write_bytes(b"".join(line + b"\n" for line in self._start))
        os.replace(beside, self._path)
        self._file = open(self._path, "ab", buffering=0)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, number: int, record: dict[str, Any]) -> None:
        """Writes one row's line."""
        try:
            self._file.write(json.dumps({"row": number, **record}).encode() + b"\n")
        except OSError as error:
            raise OutputError(f"cannot write {self._path}: {error.strerror}") from error

    def drawn(self, number: int, path: Path, made: dict[str, str]) -> None:
        """Writes the line of an image, of the metadata that is in it."""
        numbers = {name: kind(made[name]) for name, kind in (("negative_scale", float), ("seed", int)) if name in made}
        self.add(number, {"file": path.name, **{name: made[name] for name in JOB if name in made}, **numbers})

    def found(self, number: int, path: Path) -> None:
        """Writes the line of an image that is there, if a kill came between the two."""
        if number not in self._known:
            self.drawn(number, path, image.read_metadata(path))


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a .txt (a prompt a line), .jsonl, .csv or .parquet file with prompt, negative_prompt, negative_scale and seed by name.

    Blank lines are no rows. Raises InputError for a file of another kind and one that cannot be read.
    """
    readers = {".txt": _lines, ".jsonl": _objects, ".csv": _records, ".parquet": _columns}
    if path.suffix not in readers:
        raise InputError(f"{path} is not one of {', '.join(KINDS)}")
    try:
        yield from enumerate(readers[path.suffix](path), 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text") from error


def _lines(path: Path) -> Iterator[dict[str, Any] | str]:
    with open(path, encoding="utf-8-sig") as file:
        yield from ({"prompt": line.strip()} for line in file if line.strip())


def _objects(path: Path) -> Iterator[dict[str, Any] | str]:
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                found: Any = None
                with suppress(ValueError):
                    found = json.loads(line)
                yield _job(found) if isinstance(found, dict) else f"not a JSON object: {line.strip()[:40]}"


def _records(path: Path) -> Iterator[dict[str, Any] | str]:
    """CSV knows text only; an empty cell is one that was not given."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        for record in csv.DictReader(file, restkey="more cells than the header has"):
            given: dict[str, Any] = {name: value for name, value in record.items() if value not in ("", None)}
            for name, kind in (("negative_scale", float), ("seed", int)):
                with suppress(ValueError):
                    given = {**given, name: kind(given[name])} if name in given else given
            yield _job(given)


def _columns(path: Path) -> Iterator[dict[str, Any] | str]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise EngineMissing(f'{path} needs pyarrow: pip install "snoopi-rt[parquet]"') from error
    try:
        file = parquet.ParquetFile(path)
        for part in file.iter_batches(1024, columns=[name for name in file.schema_arrow.names if name in JOB]):
            yield from (_job({name: value for name, value in row.items() if value is not None}) for row in part.to_pylist())
    except ArrowInvalid as error:
        raise InputError(f"{path} is not a whole Parquet file") from error


def _job(given: dict[str, Any]) -> dict[str, Any] | str:
    if unknown := set(given) - set(JOB):
        return f"unknown {min(unknown)!r}, choose from {', '.join(JOB)}"
    return given if "prompt" in given else "no prompt"
