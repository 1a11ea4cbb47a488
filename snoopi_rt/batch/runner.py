"""Many prompts of a file to images in a folder: in constant memory, resumed after a kill, with an index of what became of each row."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from snoopi_rt import image
from snoopi_rt.batch.index import INDEX, Index
from snoopi_rt.batch.prompt_file import PromptFile
from snoopi_rt.batch.prompt_formats import InvalidRow
from snoopi_rt.errors import InputError, OutputError
from snoopi_rt.files import alone, check_place, reason
from snoopi_rt.pipeline import Pipeline
from snoopi_rt.request import Request, check_seed, image_size, parse_requests
from snoopi_rt.result import Result
from snoopi_rt.shell import quote

Job = tuple[int, Request]
"""A row's number and what is drawn for it."""


@dataclass
class Outcome:
    """How many rows were drawn now, were there before, and failed; how many of those drawn now there are warnings of, and the first."""

    drawn: int = 0
    kept: int = 0
    failed: int = 0
    warned: int = 0
    warning: str = ""


@dataclass(frozen=True)
class Drawn:
    """What became of a row: an image's file and the metadata in it, with a warning if there is one, or an error."""

    row: int
    file: bytes = b""
    metadata: dict[str, str] = field(default_factory=dict)
    error: str = ""
    warning: str = ""


@dataclass(frozen=True)
class Batch:
    """What is drawn from a file: row i with seed + i - 1 unless it has its own; negative and scale if a row has none."""

    prompts: Path | PromptFile
    out: Path
    seed: int = 0
    negative: str | None = None
    scale: float | None = None
    size: tuple[int, int] | None = None
    truncate: bool = False
    format: str = "png"

    def run(self, pipe: Pipeline, progress: Callable[[int], None] = lambda rows: None, draw: "Draw | None" = None) -> Outcome:
        """Draws what is not there yet; progress(rows) after each few. `draw`: how; by default here, in this process.

        Raises InputError for a file that cannot be read, settings that no row can have and a folder that holds another batch, OutputError
        if an image cannot be written. A row that cannot be drawn is listed in the index with its reason, and the rest is done.
        """
        if isinstance(self.prompts, Path):
            with PromptFile(self.prompts) as prompts:
                return replace(self, prompts=prompts).run(pipe, progress, draw)
        self._check(pipe, self.prompts)
        outcome = Outcome()
        with alone(self.out, "drawing"), Index(self.out / INDEX, self._identity(pipe, self.prompts), self._path) as index:
            for drawn in (draw or draw_here)(pipe, self, self._to_draw(pipe, self.prompts, index, outcome, progress)):
                if drawn.error:
                    outcome.failed += 1
                    index.add(drawn.row, {"error": drawn.error})
                else:
                    outcome.drawn += 1
                    image.write(drawn.file, self._path(drawn.row))
                    index.drawn(drawn.row, len(drawn.file), drawn.metadata, drawn.warning)
                    if drawn.warning:
                        outcome.warned += 1
                        outcome.warning = outcome.warning or f"row {drawn.row}: {drawn.warning}"
                progress(1)
        return outcome

    def check_folder(self) -> None:
        """Returns if images can be written there, before anything is loaded. Raises OutputError."""
        try:
            check_place(self._path(1))
        except OSError as error:
            raise OutputError(f"cannot write into {quote(self.out)}: {reason(error)}") from error

    def _check(self, pipe: Pipeline, prompts: PromptFile) -> None:
        """Raises InputError once for what would be wrong in every row, and for a scale that no row would use."""
        check_seed(self.seed)
        scale, negative = self.scale, (self.negative or "").strip()
        if not prompts.check().negative and scale is not None and not negative:
            raise InputError(f"negative scale {scale} without a negative prompt: neither a row nor --neg gives one")
        # If rows have negative prompts, the scale is judged beside one of them.
        parse_requests("prompt", negative or (None if scale is None else "negative"), scale, self.seed, 1, pipe.bundle.guidance)
        image_size(self.size, pipe.bundle.sizes)
        if negative:
            pipe.check(negative, truncate=self.truncate)

    def _to_draw(
        self, pipe: Pipeline, prompts: PromptFile, index: Index, outcome: Outcome, progress: Callable[[int], None]
    ) -> Iterator[Job]:
        """The jobs that are still to be drawn; of the other rows it is noted what became of them."""
        for number, _, row in prompts.rows():
            job = row if isinstance(row, InvalidRow) else self._request(number, row, pipe)
            state = job if isinstance(job, InvalidRow) else self._state(number, job, pipe, index)
            if state == "draw":
                assert not isinstance(job, InvalidRow)
                yield number, job
                continue
            if state == "kept":
                outcome.kept += 1
            else:
                outcome.failed += 1
                index.add(number, {"error": state})
            progress(1)

    def _state(self, number: int, job: Request, pipe: Pipeline, index: Index) -> str:
        """ "kept" for a row whose image is there, "draw" for one that is to be drawn, else why it cannot be.

        An image that is not in the index is noted there: a kill came between the two, or it is of something else.
        """
        if index.holds(number, job):
            return "kept"
        path, metadata = self._path(number), {}
        condition = image.condition(path)
        if condition == "missing" or (condition == "damaged" and number in index.damaged):
            return "draw"
        with suppress(InputError):
            metadata = image.read_metadata(path)
        ours = condition != "foreign" and _fits(metadata, job, pipe.bundle.hash)
        if not ours:
            return f"{path.name} is there and is not this row's image: remove it"
        if condition == "damaged":
            return "draw"
        index.drawn(number, path.stat().st_size, metadata)
        return "kept"

    def _request(self, number: int, row: dict[str, Any], pipe: Pipeline) -> Request:
        negative = row.get("negative_prompt", self.negative)
        if isinstance(negative, str) and not negative.strip():
            negative = None  # this row has none
        default = pipe.bundle.guidance.scale.default if self.scale is None else self.scale
        scale = row.get("negative_scale", None if negative is None else default)
        seed = row["seed"] if "seed" in row else check_seed(self.seed + number - 1)
        return Request(row["prompt"], negative, scale, seed)

    def _path(self, number: int) -> Path:
        return self.out / f"{number:06}.{self.format}"

    def _identity(self, pipe: Pipeline, prompts: PromptFile) -> dict[str, Any]:
        settings = [self.seed, self.negative, self.scale, self.size, self.truncate, self.format]
        return {"batch": 1, "bundle_hash": pipe.bundle.hash, "prompts": prompts.sha256, "settings": settings}


Draw = Callable[[Pipeline, Batch, Iterable[Job]], Iterable[Drawn]]
"""draw(pipe, batch, jobs), in any order; jobs are read as they are needed."""


def draw_here(pipe: Pipeline, batch: Batch, jobs: Iterable[Job]) -> Iterator[Drawn]:
    """Draws jobs in this process, as many at once as the bundle takes."""
    waiting = iter(jobs)
    while together := list(islice(waiting, pipe.max_batch)):
        yield from draw_together(pipe, batch, together)


def draw_together(pipe: Pipeline, batch: Batch, jobs: list[Job]) -> list[Drawn]:
    """Draws some jobs in one call; if one of them cannot be drawn, each by itself."""
    results = pipe.run_each([[request] for _, request in jobs], batch.size, batch.truncate)
    return [_drawn(row, result, batch.format) for (row, _), result in zip(jobs, results, strict=True)]


def _drawn(row: int, result: Result | BaseException, format: str) -> Drawn:
    """What became of a row. Raises what is no fault of this row alone."""
    try:
        if isinstance(result, BaseException):
            raise result
        metadata = result.metadata(0)
        file = image.encode(result.images[0], image.FORMATS[f".{format}"], metadata)
    except (InputError, OutputError) as error:
        return Drawn(row, error=str(error))
    return Drawn(row, file, metadata, warning="".join(result.warnings))


def _fits(metadata: dict[str, str], request: Request, bundle_hash: str) -> bool:
    """Whether an image's metadata say what the request asks for, and nothing else."""
    scale = request.negative_scale
    texts = {**vars(request), "negative_scale": float(scale) if isinstance(scale, int | float) else scale, "bundle_hash": bundle_hash}
    return all(metadata.get(name) == (None if value is None else str(value)) for name, value in texts.items())
