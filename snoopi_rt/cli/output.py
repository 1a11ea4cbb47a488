"""The pictures of one PROMPT on the command line: which are drawn, how they are put together, where they are written."""

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
from snoopi_rt.pipeline import EMBEDDED, Pipeline
from snoopi_rt.request import image_size
from snoopi_rt.shell import join, json_line, quote, visible

TOGETHER = 16
"""Images of one call at most: as fast as more, and what is stopped meanwhile is little."""


@dataclass(frozen=True)
class Picture:
    """What one file holds. `facts` is its metadata as numbers and text, with what took how long and what is to be warned of."""

    image: np.ndarray
    metadata: dict[str, str]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Drawing:
    """A picture per seed and scale; or, with `side_by_side`, a picture per seed: without the negative prompt, then with it at each scale.

    A scale of None is the bundle's; `size` is (height, width), None: the bundle's first.
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
        """The seed and the scale of each picture."""
        scales = (None,) if self.side_by_side else self.scales
        return [seed for seed in self.seeds for _ in scales], list(scales) * len(self.seeds)

    def check(self, pipe: Pipeline) -> tuple[int, int]:
        """The height and width of a picture. Raises InputError for what cannot be asked."""
        pipe.check(**self._jobs(self.seeds[:1]), size=self.size, truncate=self.truncate)
        height, width = image_size(self.size, pipe.bundle.sizes)
        return height, width * (len(self._kinds) if self.side_by_side else 1)

    def pictures(self, pipe: Pipeline) -> Iterator[Picture]:
        """The pictures, seed by seed, as many at once as the bundle takes. Raises what `generate` raises."""
        together = max(1, min(pipe.max_batch, TOGETHER) // len(self._kinds))
        for start in range(0, len(self.seeds), together):
            seeds = self.seeds[start : start + together]
            result = pipe.generate(**self._jobs(seeds), size=self.size, truncate=self.truncate)
            images, step = result.images, len(self._kinds) if self.side_by_side else 1
            for first in range(0, len(images), step):
                last = first + step - 1  # with the negative prompt
                metadata = result.metadata(last)
                scale: Any = result.requests[last].negative_scale
                if self.side_by_side:
                    scale = [request.negative_scale for request in result.requests[first + 1 : last + 1]]
                    metadata |= {"side_by_side": "yes", "negative_scale": ",".join(map(str, scale))}
                texts = {"prompt": self.prompt, "negative_prompt": None, **metadata}
                facts = texts | {
                    "negative_scale": scale,
                    "seed": result.seeds[last],
                    "timings": result.timings,
                    "warnings": result.warnings,
                }
                yield Picture(image.grid(images[first : last + 1], step), metadata, facts)

    @property
    def _kinds(self) -> list[tuple[str | None, float | None]]:
        """The negative prompt and the scale of each image of one seed."""
        kinds: list[tuple[str | None, float | None]] = [(self.negative, scale) for scale in self.scales]
        return [(None, None), *kinds] if self.side_by_side else kinds

    def _jobs(self, seeds: tuple[int, ...]) -> dict[str, Any]:
        negatives, scales = zip(*self._kinds, strict=True)
        return {
            "prompt": [self.prompt] * len(self._kinds) * len(seeds),
            "negative_prompt": list(negatives) * len(seeds),
            "negative_scale": list(scales) * len(seeds),
            "seed": [seed for seed in seeds for _ in self._kinds],
        }


class Files:
    """Where the pictures of a drawing go: one file each, or standard output for "-".

    Raises InputError and OutputError where they cannot be written, so that nobody waits for them.
    """

    def __init__(self, output: str | None, format: str | None, drawing: Drawing, force: bool) -> None:
        seeds, scales = drawing.labels
        self._paths: list[Path] = []
        self._format = image.FORMATS[f".{format or 'png'}"]
        if output == "-":
            if len(seeds) > 1:
                raise InputError(f"-o - is for one picture, not {len(seeds)}: give a folder")
            if sys.stdout is None or sys.stdout.isatty():
                raise InputError("-o - writes the picture to standard output, which is a terminal or closed: add > FILE")
            return
        self._paths = image_paths(output, format, [drawing.prompt] * len(seeds), seeds, scales)
        named = output is not None and not is_folder(output)
        self._taken: image.Taken = "count" if not named else "replace" if force else "refuse"
        for path in self._paths:
            image.check_writable(path, self._taken)
        self._format = image.FORMATS[self._paths[0].suffix.lower()]

    def check_format(self, size: tuple[int, int], drawing: Drawing) -> None:
        """Returns where the format can hold pictures of that height and width with what makes them again. Raises OutputError."""
        if self._format != "png":
            texts = {"prompt": drawing.prompt, "negative": drawing.negative or "", "rest": " " * 2000}
            image.encode(np.zeros((*size, 3), np.uint8), self._format, texts)

    def save(self, index: int, picture: Picture) -> Path | None:
        """Writes one of the pictures; its path, None for standard output. Raises InputError and OutputError."""
        if self._paths:
            return image.save(picture.image, self._paths[index], picture.metadata, self._taken)
        try:
            sys.stdout.buffer.write(image.encode(picture.image, self._format, picture.metadata))
            sys.stdout.flush()
        except OSError as error:
            discard(sys.stdout)
            raise OutputError(f"cannot write to standard output: {error.strerror}") from error
        return None


def tell(picture: Picture, path: Path | None, as_json: bool, scaled: bool) -> None:
    """Prints what was written, on standard error where the picture itself went to standard output."""
    if as_json:
        line = json_line({"file": None if path is None else str(path), **picture.facts})
    else:
        scale = f"  scale {picture.facts['negative_scale']:g}" if scaled else ""
        line = f"{'-' if path is None else quote(path)}  seed {picture.facts['seed']}{scale}"
    try:
        click.echo(line, err=path is None)
    except BrokenPipeError:  # the files are what was asked for: a reader that has seen enough does not end it
        discard(sys.stderr if path is None else sys.stdout)


def warn(lines: Iterable[str], bundle: Bundle) -> None:
    """Prints what a bundle does not know on standard error, and how to see what it does."""
    for line in lines:
        count = len(bundle.vocabulary.objects) if bundle.vocabulary else 0
        folder = [] if bundle.folder == EMBEDDED else [str(bundle.folder)]
        click.echo(visible(f"{line}; all {count}: {join(['snoopi-rt', 'info', '--vocabulary', *folder])}"), err=True)


def show(path: Path) -> None:
    """Opens the picture in the program that the desktop has for it. Raises OutputError where there is none."""
    opener = {"darwin": "open", "win32": "explorer"}.get(sys.platform, "xdg-open")
    try:
        subprocess.run([opener, path.absolute()], check=sys.platform != "win32", capture_output=True)  # explorer always ends with 1
    except (OSError, subprocess.CalledProcessError) as error:
        raise OutputError(f"{quote(path)} is written, but nothing here can show it") from error
