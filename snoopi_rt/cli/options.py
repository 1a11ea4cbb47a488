"""Options, parameter types and progress output that several commands share."""

import glob
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from snoopi_rt.engines import ENGINES
from snoopi_rt.errors import InputError, PackageMissing, how_to_install
from snoopi_rt.files import check_folder
from snoopi_rt.shell import quote, visible

if TYPE_CHECKING:
    from snoopi_rt.batch.ray import Workers

PROGRESS_SECONDS = 2.0
"""Seconds between two progress lines."""
RECIPES = "snoopi_rt.export.training.recipes"
file_path = click.Path(dir_okay=False, path_type=Path)
folder_path = click.Path(file_okay=False, path_type=Path)


def once(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> str | None:
    """The one value of a text option. Raises UsageError for a second one, of which click would silently take the last."""
    if len(values) > 1:
        raise click.UsageError(f"{param.opts[0]} is given {len(values)} times: join the texts with commas", ctx)
    return values[0] if values else None


class Group(click.Group):
    """A group that lists its commands with whole summaries, however long."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.commands[name].get_short_help_str(sys.maxsize)) for name in self.list_commands(ctx)])


Completion = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def completed_by(names: Callable[[], Iterable[str]]) -> Completion:
    """Completes an option's value to one of the names, which are computed only when a shell asks."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in names() if name.startswith(incomplete)]

    return complete


def complete_bundle(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes [NAME=]FOLDER to folders that hold a bundle; if none does, to any folder, as the shell does it."""
    from snoopi_rt.bundle.manifest import MANIFEST

    name, equals, path = incomplete.rpartition("=")
    manifests = sorted(glob.glob(os.path.join(f"{glob.escape(path)}*", MANIFEST)))
    return [CompletionItem(f"{name}{equals}{os.path.dirname(file)}") for file in manifests] or [CompletionItem(incomplete, type="dir")]


class Size(click.ParamType):
    """WIDTHxHEIGHT in pixels, to (height, width)."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        from snoopi_rt.request import parse_size

        return parse_size(value)


class Seed(click.ParamType):
    """A seed, validated as everywhere else."""

    name = "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from snoopi_rt.json_reader import parse_number
        from snoopi_rt.request import check_seed

        number = None
        if isinstance(value, str):
            with suppress(ValueError):
                number = parse_number(value)
        return check_seed(value if number is None else number)


class Integer(click.IntRange):
    """An integer in a range, called "integer" in errors."""

    name = "integer"


class Number(click.FloatRange):
    """A finite number: click's own type accepts NaN and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


def _not_empty(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuses an empty value: it comes from an unset shell variable, and does not mean the default."""
    if value == "":
        raise InputError(f"{param.opts[0]} is empty: give a folder")
    return value


ENGINE_NAMES = " or ".join(", ".join(ENGINES).rsplit(", ", 1))
"""For people."""
bundle_option = click.option(
    "--bundle",
    metavar="FOLDER",
    callback=_not_empty,
    shell_complete=complete_bundle,
    help="Folder of the bundle.  [default: the embedded bundle]",
)
engine_option = click.option(
    "--engine",
    default="auto",
    metavar="NAME",
    shell_complete=completed_by(lambda: ("auto", *ENGINES)),
    help=f"{ENGINE_NAMES}, if the bundle supports it; auto: the fastest that `bench` measured, or else cpu, then openvino.",
)
precision_option = click.option(
    "--precision",
    metavar="NAME",
    help="Precision of the bundle, such as fp32, or one per graph: generator=int8,decoder=fp16.  [default: the bundle's first]",
)
threads_option = click.option("--threads", type=int, metavar="N", help="CPU threads.  [default: one per available core]")
worker_threads_option = click.option(
    "--threads", type=int, metavar="N", help="CPU threads; with --ray, per worker.  [default: one per available core; with --ray: 1]"
)


backbone_option = click.option(
    "--backbone",
    default="small",
    metavar="NAME",
    shell_complete=completed_by(lambda: import_module(RECIPES).DEFAULT),
    help="small, pixart, sd15 or sd21.",
)
out_option = click.option("--out", type=folder_path, required=True, metavar="FOLDER", help="Output folder.")


class Range(click.ParamType):
    """N, or MIN-MAX, to (min, max)."""

    name = "N[-MAX]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        low, dash, high = value.partition("-")
        try:
            limits = int(low), int(high if dash else low)
        except ValueError:
            limits = 0, 0
        if not 1 <= limits[0] <= limits[1]:
            raise InputError(f"{value!r} is not a number of workers, such as 4 or 1-8")
        return limits


def ray_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--ray, --workers and --gpus."""
    gpus = click.option("--gpus", type=Number(0), metavar="X", help="With --ray: GPUs per worker; 0.5 means two workers share one.")
    workers = click.option(
        "--workers", type=Range(), metavar="N[-MAX]", help="With --ray: number of workers; N-MAX scales with the load.  [default: 1]"
    )
    ray = click.option("--ray", is_flag=True, help="Draw on the Ray cluster at $RAY_ADDRESS, or else on a local one.")
    return ray(workers(gpus(command)))


def ray_workers(ray: bool, workers: tuple[int, int] | None, gpus: float | None, threads: int | None) -> "Workers | None":
    """The workers that the options describe; None without --ray. A worker takes `threads` CPUs, by default one.

    Raises InputError for options that need --ray, PackageMissing if Ray is not installed.
    """
    if not ray:
        if workers is not None or gpus is not None:
            raise InputError("--workers and --gpus go with --ray")
        return None
    try:
        from snoopi_rt.batch.ray import Workers
    except ImportError as error:
        raise PackageMissing(f"--ray needs {error.name}: {how_to_install('ray')}") from error
    return Workers(*(workers or (1, 1)), cpus=threads or 1, gpus=gpus or 0)


def report_compiling(progress: dict[str, str]) -> Callable[[str, float], None]:
    """A callback that shows in a `progress_line` what an engine is compiling."""

    def report(step: str, share: float) -> None:
        progress["doing"] = f"{step}, {share:.0%}"

    return report


def prompt_file_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--prompts-format and --ignore-columns."""
    ignore_columns = click.option("--ignore-columns", is_flag=True, help="Skip unknown columns instead of refusing the file.")
    formats = click.Choice(["txt", "csv", "tsv", "json", "jsonl", "parquet"])
    prompts_format = click.option(
        "--prompts-format", type=formats, help="Format of the prompts.  [default: from the file's ending; detected for -]"
    )
    return prompts_format(ignore_columns(command))


def named_folder(text: str) -> tuple[str, Path]:
    """The name and the folder of [NAME=]FOLDER; the name defaults to the folder's. A folder's name may contain an equals sign.

    Raises InputError for one that does not exist, and for a name that is no plain one: files are named after it.
    """
    if not text or text.endswith("="):
        raise InputError(f"{text!r} names no folder: give FOLDER, or NAME=FOLDER")
    name, equals, path = text.partition("=") if not Path(text).is_dir() else ("", "", text)
    folder = check_folder(Path(path if equals else text)).resolve()
    if equals and (name in ("", ".", "..") or set(name) & {"/", "\\"} or not name.isprintable()):
        raise InputError(f"name {name!r} of {quote(folder)} is not a plain name: files are named after it")
    return (name if equals else folder.name), folder


@contextmanager
def progress_line(doing: str = "loading") -> Iterator[dict[str, str]]:
    """Prints on standard error every two seconds what is being done: quick work stays silent."""
    progress, done, start = {"doing": doing}, threading.Event(), time.monotonic()

    def report() -> None:
        while not done.wait(PROGRESS_SECONDS):
            click.echo(f"{progress['doing']} ({time.monotonic() - start:.0f} s)", err=True)

    threading.Thread(target=report, daemon=True).start()
    try:
        yield progress
    finally:
        done.set()


def say(line: str) -> None:
    """Prints a line on standard error."""
    click.echo(visible(line), err=True)


def discard(*streams: IO[str]) -> None:
    """Redirects the streams to nowhere: their reader is gone, and Python would report that when it exits."""
    with open(os.devnull, "wb") as devnull:
        for stream in streams:
            with suppress(OSError, ValueError):
                os.dup2(devnull.fileno(), stream.fileno())
