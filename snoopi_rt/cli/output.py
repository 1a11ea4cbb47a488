"""The images of one PROMPT on the command line: which are drawn, how they are combined, where they are written."""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from snoopi_rt import image
from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cli.options import discard
from snoopi_rt.errors import InputError, OutputError
from snoopi_rt.image_names import image_paths, is_folder
from snoopi_rt.interrupts import deferred
from snoopi_rt.pipeline import EMBEDDED, Pipeline
from snoopi_rt.request import image_size
from snoopi_rt.shell import join, json_line, quote, visible

MAX_PER_CALL = 16
"""Images per call: more are no faster, and an interrupt loses less."""


@dataclass(frozen=True)
class OutputImage:
    """The contents of one file. `fields` is its metadata for --json: typed, with timings and warnings."""

    image: np.ndarray
    metadata: dict[str, str]
    fields: dict[str, Any]


@dataclass(frozen=True)
class PromptImages:
    """One image per seed and scale; with `side_by_side` one per seed: without the negative prompt, then with it at each scale.

    A scale of None means the bundle's default; `size` is (height, width), None means the bundle's first.
    """

    prompt: str
    negative: str | None
    scales: tuple[float | None, ...]
    seeds: tuple[int, ...]
    size: tuple[int, int] | None
    truncate: bool
    side_by_side: bool

    @property
    def labels(self) -> tuple[list[int], list[float | None]]:
        """The seed and the scale of each image."""
        scales = (None,) if self.side_by_side else self.scales
        return [seed for seed in self.seeds for _ in scales], list(scales) * len(self.seeds)

    def check(self, pipe: Pipeline) -> tuple[int, int]:
        """The height and width of an image. Raises InputError for arguments that the bundle cannot draw."""
        pipe.check(**self._arguments(self.seeds[:1]), size=self.size, truncate=self.truncate)
        height, width = image_size(self.size, pipe.bundle.sizes)
        return height, width * (len(self._variations) if self.side_by_side else 1)

    def draw(self, pipe: Pipeline) -> Iterator[OutputImage]:
        """The images, seed by seed, in calls as large as the bundle supports. Raises what `generate` raises."""
        seeds_per_call = max(1, min(pipe.max_batch, MAX_PER_CALL) // len(self._variations))
        for start in range(0, len(self.seeds), seeds_per_call):
            seeds = self.seeds[start : start + seeds_per_call]
            result = pipe.generate(**self._arguments(seeds), size=self.size, truncate=self.truncate)
            images, step = result.images, len(self._variations) if self.side_by_side else 1
            for first in range(0, len(images), step):
                last = first + step - 1  # with the negative prompt
                metadata = result.metadata(last)
                scale: Any = result.requests[last].negative_scale
                if self.side_by_side:
                    scale = [request.negative_scale for request in result.requests[first + 1 : last + 1]]
                    metadata |= {"side_by_side": "yes", "negative_scale": ",".join(map(str, scale))}
                fields = {
                    "prompt": self.prompt,
                    "negative_prompt": None,
                    **metadata,
                    "negative_scale": scale,
                    "seed": result.seeds[last],
                    "timings": result.timings,
                    "warnings": result.warnings,
                }
                yield OutputImage(image.grid(images[first : last + 1], step), metadata, fields)

    @property
    def _variations(self) -> list[tuple[str | None, float | None]]:
        """The negative prompt and the scale of each image of one seed."""
        variations: list[tuple[str | None, float | None]] = [(self.negative, scale) for scale in self.scales]
        return [(None, None), *variations] if self.side_by_side else variations

    def _arguments(self, seeds: tuple[int, ...]) -> dict[str, Any]:
        negatives, scales = zip(*self._variations, strict=True)
        return {
            "prompt": [self.prompt] * len(self._variations) * len(seeds),
            "negative_prompt": list(negatives) * len(seeds),
            "negative_scale": list(scales) * len(seeds),
            "seed": [seed for seed in seeds for _ in self._variations],
        }


class Files:
    """The files that the images are written to, one each, or standard output for "-".

    Raises InputError and OutputError at once if they cannot be written.
    """

    def __init__(self, output: str | None, format: str | None, images: PromptImages, force: bool) -> None:
        seeds, scales = images.labels
        self._paths: list[Path] = []
        self._format = image.FORMATS[f".{format or 'png'}"]
        if output == "-":
            if len(seeds) > 1:
                raise InputError(f"-o - writes one image, not {len(seeds)}: give a folder")
            if sys.stdout is None or sys.stdout.isatty():
                raise InputError("-o - writes the image to standard output, which is a terminal or closed: add > FILE")
            return
        self._paths = image_paths(output, format, [images.prompt] * len(seeds), seeds, scales)
        named = output is not None and not is_folder(output)
        self._if_exists: image.IfExists = "count" if not named else "replace" if force else "refuse"
        for path in self._paths:
            image.check_writable(path, self._if_exists)
        self._format = image.FORMATS[self._paths[0].suffix.lower()]

    def check_format(self, size: tuple[int, int], images: PromptImages) -> None:
        """Raises OutputError if the format cannot hold images of that height and width with their metadata."""
        if self._format != "png":
            texts = {"prompt": images.prompt, "negative": images.negative or "", "rest": " " * 2000}
            image.encode(np.zeros((*size, 3), np.uint8), self._format, texts)

    def save(self, index: int, drawn: OutputImage) -> Path | None:
        """Writes one of the images; returns its path, None for standard output. Raises InputError and OutputError."""
        if self._paths:
            with deferred() as signals:  # one in the middle could leave the temporary file
                path = image.save(drawn.image, self._paths[index], drawn.metadata, self._if_exists)
            if signals:
                raise signals[0]
            return path
        try:
            sys.stdout.buffer.write(image.encode(drawn.image, self._format, drawn.metadata))
            sys.stdout.flush()
        except OSError as error:
            discard(sys.stdout)
            raise OutputError(f"cannot write to standard output: {error.strerror}") from error
        return None


def report(drawn: OutputImage, path: Path | None, as_json: bool, show_scale: bool) -> None:
    """Prints what was written, on standard error if the image itself went to standard output."""
    if as_json:
        line = json_line({"file": None if path is None else str(path), **drawn.fields})
    else:
        scale = f"  scale {drawn.fields['negative_scale']:g}" if show_scale else ""
        line = f"{'-' if path is None else quote(path)}  seed {drawn.fields['seed']}{scale}"
    try:
        click.echo(line, err=path is None)
    except BrokenPipeError:  # the files matter, not the lines: a reader that closes the pipe does not stop the command
        discard(sys.stderr if path is None else sys.stdout)


def warn(lines: Iterable[str], bundle: Bundle) -> None:
    """Prints warnings about prompts on standard error, and how to list what the bundle can draw."""
    for line in lines:
        folder = [] if bundle.folder == EMBEDDED else [str(bundle.folder)]
        click.echo(visible(f"{line}; what it knows: {join(['snoopi-rt', 'info', '--vocabulary', *folder])}"), err=True)


def show(path: Path) -> None:
    """Opens the image in the desktop's viewer. Raises OutputError if there is none."""
    opener = {"darwin": "open", "win32": "explorer"}.get(sys.platform, "xdg-open")
    try:
        subprocess.run([opener, path.absolute()], check=sys.platform != "win32", capture_output=True)  # explorer always exits with 1
    except (OSError, subprocess.CalledProcessError) as error:
        raise OutputError(f"{quote(path)} was written, but there is no program to show it") from error
