"""Many prompts of a file to images in a folder: in constant memory, resumed after a kill, with an index of what became of each row."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

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
        self.out.mkdir(parents=True, exist_ok=True)
        index, outcome = _Index(self.out / INDEX, self._identity(pipe)), Outcome()
        with index:
            for drawn in (draw or draw_here)(pipe, self, self._wanted(index, outcome, progress)):
                if drawn.error:
                    outcome.failed += 1
                    index.add(drawn.row, {"error": drawn.error})
                else:
                    outcome.drawn += 1
                    image.write(drawn.file, self._path(drawn.row))
                    index.drawn(drawn.row, self._path(drawn.row), drawn.metadata)
                progress(1)
        return outcome

    def _wanted(self, index: "_Index", outcome: Outcome, progress: Callable[[int], None]) -> Iterator[Job]:
        """The jobs that are still to be drawn; of the other rows it is noted what became of them."""
        for number, job in read_rows(self.prompts):
            path = self._path(number)
            if path.exists():
                outcome.kept += 1
                index.found(number, path)
            elif isinstance(job, str):
                outcome.failed += 1
                index.add(number, {"error": job})
            else:
                yield number, self._job(number, job)
                continue
            progress(1)

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
        return [Drawn(row, image.encode(picture, batch.format, metadata), metadata) for row, picture, metadata in found]
    except (InputError, OutputError) as error:
        if len(jobs) == 1:
            return [Drawn(jobs[0][0], error=str(error))]
        return [each for job in jobs for each in draw_together(pipe, batch, [job])]


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
