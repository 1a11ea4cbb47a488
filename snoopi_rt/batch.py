"""Many prompts of a file to images in a folder: in constant memory, resumed after a kill, with an index of what became of each row."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Self

from snoopi_rt import image
from snoopi_rt.engines.base import InputError, OutputError
from snoopi_rt.pipeline import JOB, Pipeline, columns
from snoopi_rt.request import SEEDS
from snoopi_rt.rows import read_rows

INDEX = "index.jsonl"
Job = tuple[int, dict[str, Any]]
"""A row's number and what `Pipeline.generate` takes."""


@dataclass
class Outcome:
    """How many rows were drawn now, were there before, and failed."""

    drawn: int = 0
    kept: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Drawn:
    """What became of a row: an image's file and the metadata in it, or an error."""

    row: int
    file: bytes = b""
    metadata: dict[str, str] = field(default_factory=dict)
    error: str = ""


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

    def run(self, pipe: Pipeline, progress: Callable[[int], None] = lambda rows: None, draw: "Draw | None" = None) -> Outcome:
        """Draws what is not there yet; progress(rows) after each few. `draw`: how, here and in one process where nothing is said.

        Raises InputError for a file that cannot be read and a folder that holds another batch, OutputError where a picture cannot be
        written. A row that cannot be drawn is listed in the index with its reason, and the rest is done.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write into {self.out}: {error.strerror}") from error
        from filelock import FileLock, Timeout

        outcome = Outcome()
        try:
            with FileLock(self.out / ".lock", timeout=0), _Index(self.out / INDEX, self._identity(pipe)) as index:
                for drawn in (draw or draw_here)(pipe, self, self._wanted(pipe, index, outcome, progress)):
                    if drawn.error:
                        outcome.failed += 1
                        index.add(drawn.row, {"error": drawn.error})
                    else:
                        outcome.drawn += 1
                        image.write(drawn.file, self._path(drawn.row))
                        index.drawn(drawn.row, self._path(drawn.row), drawn.metadata)
                    progress(1)
        except Timeout as error:
            raise InputError(f"another process draws into {self.out}") from error
        return outcome

    def _wanted(self, pipe: Pipeline, index: "_Index", outcome: Outcome, progress: Callable[[int], None]) -> Iterator[Job]:
        """The jobs that are still to be drawn; of the other rows it is noted what became of them."""
        for number, row in read_rows(self.prompts):
            path = self._path(number)
            job = row if isinstance(row, str) else self._job(number, row)
            if isinstance(job, str):
                outcome.failed += 1
                index.add(number, {"error": job})
            elif number in index:
                outcome.kept += 1
            elif not _is_whole(path):
                yield number, job
                continue
            else:
                self._found(number, path, job, pipe, index, outcome)
            progress(1)

    def _found(self, number: int, path: Path, job: dict[str, Any], pipe: Pipeline, index: "_Index", outcome: Outcome) -> None:
        """Notes an image that is there and not in the index: a kill came between the two, or it is of something else."""
        made: dict[str, str] = {}
        with suppress(InputError):
            made = image.read_metadata(path)
        if _fits(made, job, pipe.bundle.hash):
            outcome.kept += 1
            index.drawn(number, path, made)
        else:
            outcome.failed += 1
            index.add(number, {"error": f"{path.name} is there and is not this row's image: remove it"})

    def _job(self, number: int, job: dict[str, Any]) -> dict[str, Any]:
        negative = job.get("negative_prompt", self.negative)
        if isinstance(negative, str) and not negative.strip():
            negative = None  # this row has none
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


Draw = Callable[[Pipeline, Batch, Iterable[Job]], Iterable[Drawn]]
"""draw(pipe, batch, jobs), in any order; jobs are read as they are needed."""


def draw_here(pipe: Pipeline, batch: Batch, jobs: Iterable[Job]) -> Iterator[Drawn]:
    """Draws jobs in this process, as many at once as the bundle takes."""
    waiting = iter(jobs)
    while together := list(islice(waiting, pipe.max_batch)):
        yield from draw_together(pipe, batch, together)


def draw_together(pipe: Pipeline, batch: Batch, jobs: list[Job]) -> list[Drawn]:
    """Draws some jobs in one call; where one of them cannot be drawn, each by itself."""
    try:
        results = pipe.generate(**columns([job for _, job in jobs]), size=batch.size, truncate=batch.truncate).split()
        found = [(row, result.images[0], result.metadata(0)) for (row, _), result in zip(jobs, results, strict=True)]
        return [
            Drawn(row, image.encode(picture, image.FORMATS[f".{batch.format}"], metadata), metadata) for row, picture, metadata in found
        ]
    except (InputError, OutputError) as error:
        if len(jobs) == 1:
            return [Drawn(jobs[0][0], error=str(error))]
        return [each for job in jobs for each in draw_together(pipe, batch, [job])]


class _Index:
    """A line of JSON a row, the first says what batch it is. A line that a kill cut short is written again."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path, self._identity = path, identity
        self._known: set[int] = set()

    def __enter__(self) -> Self:
        beside = self._path.with_name(f".{self._path.name}.part")
        try:
            with open(beside, "wb") as file:
                file.write(json.dumps(self._identity).encode() + b"\n")
                for line in self._still_right():
                    file.write(line)
            os.replace(beside, self._path)
            self._file = open(self._path, "ab", buffering=0)
        except OSError as error:
            raise OutputError(f"cannot write {self._path}: {error.strerror}") from error
        finally:
            beside.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, number: int) -> bool:
        """Whether the row's image was listed when the batch began."""
        return number in self._known

    def add(self, number: int, record: dict[str, Any]) -> None:
        """Writes one row's line."""
        line = json.dumps({"row": number, **record}).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise OutputError(f"cannot write {self._path}: {error.strerror}") from error
        if written != len(line):
            raise OutputError(f"cannot write {self._path}: the disk is full")

    def drawn(self, number: int, path: Path, made: dict[str, str]) -> None:
        """Writes the line of an image, of the metadata that is in it."""
        numbers = {name: kind(made[name]) for name, kind in (("negative_scale", float), ("seed", int)) if name in made}
        self.add(number, {"file": path.name, **{name: made[name] for name in JOB if name in made}, **numbers})

    def _still_right(self) -> Iterator[bytes]:
        """The lines of images that are there. What failed, and what is not there any more, is drawn again."""
        if not _is_whole(self._path):
            return
        with open(self._path, "rb") as file:
            first = _record(file.readline())
            if "batch" not in first:
                raise InputError(f"{self._path} is not an index of snoopi-rt")
            if first != json.loads(json.dumps(self._identity)):
                raise InputError(f"{self._path.parent} holds another batch (other prompts, bundle or settings): choose another folder")
            for line in file:
                record = _record(line)
                if isinstance(record.get("row"), int) and "file" in record and _is_whole(self._path.parent / str(record["file"])):
                    self._known.add(record["row"])
                    yield line


def _record(line: bytes) -> dict[str, Any]:
    """What a whole line says; nothing where it was cut short or damaged."""
    with suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict) and line.endswith(b"\n"):
            return found
    return {}


def _is_whole(path: Path) -> bool:
    """Whether a file is there: a power cut may leave its name alone."""
    return path.is_file() and path.stat().st_size > 0


def _fits(made: dict[str, str], job: dict[str, Any], bundle_hash: str) -> bool:
    """Whether an image's metadata say what the job asks for."""
    asked = {"bundle_hash": bundle_hash, **{name: job[name] for name in JOB if job[name] is not None}}
    return all(made.get(name) == (str(float(value)) if name == "negative_scale" else str(value)) for name, value in asked.items())
