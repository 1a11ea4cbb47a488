"""Options and words that several commands share."""

import glob
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from snoopi_rt.errors import EngineMissing, InputError, how_to_install

if TYPE_CHECKING:
    from snoopi_rt.batch.ray import Workers

PATIENCE = 2.0
"""Seconds without a word on standard error."""


class Group(click.Group):
    """A group that lists its commands with whole summaries, however long."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.commands[name].get_short_help_str(sys.maxsize)) for name in self.list_commands(ctx)])


Completion = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def completed_by(names: Callable[[], Iterable[str]]) -> Completion:
    """Completes an option's value to one of the names, which are looked up only when a shell asks."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in names() if name.startswith(incomplete)]

    return complete


def complete_bundle(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes [NAME=]FOLDER to folders that hold a bundle; where none does, to any folder, as the shell does it."""
    from snoopi_rt.bundle.manifest import MANIFEST

    name, equals, path = incomplete.rpartition("=")
    manifests = sorted(glob.glob(os.path.join(f"{glob.escape(path)}*", MANIFEST)))
    return [CompletionItem(f"{name}{equals}{os.path.dirname(file)}") for file in manifests] or [CompletionItem(incomplete, type="dir")]


def engines() -> Iterable[str]:
    """The names of all engines."""
    from snoopi_rt.engines import ENGINES

    return ENGINES


class Size(click.ParamType):
    """WIDTHxHEIGHT in pixels, to (height, width)."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        from snoopi_rt.request import parse_size

        return parse_size(value)


class Seed(click.ParamType):
    """A seed by the one rule that they have everywhere."""

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
    """An integer, by the name that people know."""

    name = "integer"


class Number(click.FloatRange):
    """A number that is one: click's own take NaN and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


def _not_empty(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """An empty value is a variable of a shell that was not set: nobody means the default by it."""
    if value == "":
        raise InputError(f"{param.opts[0]} names no folder")
    return value


bundle_option = click.option(
    "--bundle",
    metavar="FOLDER",
    callback=_not_empty,
    shell_complete=complete_bundle,
    help="The bundle's folder.  [default: the one that came with snoopi-rt]",
)
engine_option = click.option(
    "--engine",
    default="auto",
    metavar="NAME",
    shell_complete=completed_by(lambda: ("auto", *engines())),
    help="cpu, openvino, cuda or tensorrt, if the bundle serves it; auto: the fastest by bench, else cpu.",
)
precision_option = click.option(
    "--precision",
    metavar="NAME",
    help="A precision of the bundle, such as fp32, or one a graph: generator=int8,decoder=fp16.  [default: the bundle's first]",
)
threads_option = click.option("--threads", type=int, metavar="N", help="CPU threads.  [default: one for each core it may use]")


class Range(click.ParamType):
    """N, or MIN-MAX, to (min, max)."""

    name = "N[-MAX]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        least, dash, most = value.partition("-")
        try:
            found = int(least), int(most if dash else least)
        except ValueError:
            found = 0, 0
        if not 1 <= found[0] <= found[1]:
            raise InputError(f"{value!r} is not a number of processes, such as 4 or 1-8")
        return found


def ray_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--ray, --workers and --gpus."""
    gpus = click.option("--gpus", type=Number(0), metavar="X", help="With --ray: GPUs per worker; 0.5: two workers share one.")
    workers = click.option("--workers", type=Range(), metavar="N[-MAX]", help="With --ray: processes that draw.  [default: 1]")
    ray = click.option("--ray", is_flag=True, help="Draw on a Ray cluster: $RAY_ADDRESS, else one on this machine.")
    return ray(workers(gpus(command)))


def ray_workers(ray: bool, workers: tuple[int, int] | None, gpus: float | None, threads: int | None) -> "Workers | None":
    """What the options say; None without --ray. A process takes `threads` CPUs, one where nothing is said.

    Raises InputError for options that need --ray, EngineMissing without its package.
    """
    if not ray:
        if workers is not None or gpus is not None:
            raise InputError("--workers and --gpus go with --ray")
        return None
    try:
        from snoopi_rt.batch.ray import Workers
    except ImportError as error:
        raise EngineMissing(f"--ray needs {error.name}: {how_to_install('ray')}") from error
    return Workers(*(workers or (1, 1)), cpus=threads or 1, gpus=gpus or 0)


def told(progress: dict[str, str]) -> Callable[[str, float], None]:
    """Tells `progress_line` of what an engine compiles."""

    def tell(what: str, share: float) -> None:
        progress["doing"] = f"{what}, {share:.0%}"

    return tell


def prompt_file_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--prompts-format and --ignore-columns."""
    ignored = click.option("--ignore-columns", is_flag=True, help="Skip columns that are not known, instead of refusing the file.")
    kinds = click.Choice(["txt", "csv", "tsv", "json", "jsonl", "parquet"])
    kind = click.option(
        "--prompts-format", "kind", type=kinds, help="The format of the prompts.  [default: from the name; of - by its content]"
    )
    return kind(ignored(command))


def named_folder(text: str) -> tuple[str, Path]:
    """The name and the folder of [NAME=]FOLDER; without a name it is the folder's own. A folder may have an equals sign in its name.

    Raises InputError for an empty one.
    """
    if not text or text.endswith("="):
        raise InputError("--bundle names no folder")
    name, equals, path = text.partition("=") if not Path(text).is_dir() else ("", "", text)
    folder = Path(path if equals else text).resolve()
    return (name if equals else folder.name), folder


@contextmanager
def progress_line(doing: str = "loading") -> Iterator[dict[str, str]]:
    """Says every two seconds on standard error what is being done: quick work is silent, slow work is not."""
    progress, done, start = {"doing": doing}, threading.Event(), time.monotonic()

    def talk() -> None:
        while not done.wait(PATIENCE):
            click.echo(f"{progress['doing']} ({time.monotonic() - start:.0f} s)", err=True)

    threading.Thread(target=talk, daemon=True).start()
    try:
        yield progress
    finally:
        done.set()


def discard(*streams: IO[str]) -> None:
    """Sends what is still printed nowhere: nobody reads it any more, and Python would complain of that at its end."""
    with open(os.devnull, "wb") as nowhere:
        for stream in streams:
            with suppress(OSError, ValueError):
                os.dup2(nowhere.fileno(), stream.fileno())
