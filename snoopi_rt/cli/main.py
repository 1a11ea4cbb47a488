"""The command line: each command parses, calls one function and prints. What is heavy is imported inside the commands."""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from snoopi_rt import __version__
from snoopi_rt.cli.eval import evaluate
from snoopi_rt.cli.export import export, presets
from snoopi_rt.cli.generate import generate
from snoopi_rt.cli.options import (
    Group,
    bundle_option,
    completed_by,
    discard,
    engine_option,
    engines,
    precision_option,
    progress_line,
    prompt_file_options,
    threads_option,
    told,
)
from snoopi_rt.cli.serve import serve
from snoopi_rt.cli.train import data, merge, train
from snoopi_rt.errors import EngineError, InputError, OutputError, SnoopiError, one_line
from snoopi_rt.files import reason
from snoopi_rt.interrupts import interruptible
from snoopi_rt.shell import json_line, quote, visible


class Commands(Group):
    """Known errors are one line on standard error: exit code 2 for what was asked wrongly, 1 for the rest; after a signal, the shell's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Takes --debug behind the command too, where people add it to a line that failed."""
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(word for word in args[:end] if word != "--debug"), *args[end:]]
        try:
            with _plain_endings():
                return super().parse_args(ctx, args)
        except OSError as error:  # of --help and --version
            discard(sys.stdout)
            click.echo(f"error: cannot write to standard output: {reason(error)}", err=True)
            ctx.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _signalled(ctx), _plain_endings():
                return super().invoke(ctx)
        except (SnoopiError, OSError) as error:
            if ctx.params["debug"]:
                raise
            if not isinstance(error, SnoopiError):
                discard(sys.stdout)  # it may be what could not be written
            click.echo(visible(f"error: {_line(error)}"), err=True)
            ctx.exit(2 if isinstance(error, InputError) else 1)


def _line(error: SnoopiError | OSError) -> str:
    """A known error's own words; of another that the system raised, the file and the reason."""
    if isinstance(error, SnoopiError):
        return str(error)
    if error.filename is not None:
        return f"{quote(str(error.filename))}: {reason(error)}"
    return f"cannot write to standard output: {reason(error)}" if _printing(error) else reason(error)


def _printing(error: OSError) -> bool:
    """Whether it was raised where something was printed."""
    return any(frame.name == "echo" for frame in traceback.extract_tb(error.__traceback__))


@contextmanager
def _signalled(ctx: click.Context) -> Iterator[None]:
    """After a signal to end the command says no more, whatever became of it on the way, and exits as shells have it."""
    with interruptible() as signals:
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if not signals and not isinstance(error, KeyboardInterrupt):
                raise
            ctx.exit(signals[0].code if signals else 130)


def _usage_line(error: click.ClickException) -> str:
    """What was typed wrongly and where to read more, instead of click's four lines."""
    message = one_line(" ".join(error.format_message().split())).rstrip(".")
    if "unexpected extra argument" in message:
        message += ": words that belong together stand in quotes"
    context = getattr(error, "ctx", None)
    more = f" (see {context.command_path} --help)" if context else ""
    return f"{message[:1].lower()}{message[1:]}{more}"


@contextmanager
def _plain_endings() -> Iterator[None]:
    """What click says holds nothing that a terminal obeys; a reader that has seen enough (`| head`) is no error."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:  # its message is the help, in several lines
        raise
    except click.ClickException as error:
        click.echo(f"error: {visible(_usage_line(error))}", err=True)
        raise click.exceptions.Exit(error.exit_code) from None
    except BrokenPipeError:
        discard(sys.stdout, sys.stderr)
        raise click.exceptions.Exit(0) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show where an error comes from.")
def main(debug: bool) -> None:
    """One-step text-to-image with negative prompts."""


for command in (generate, data, train, merge, evaluate, export, presets, serve):
    main.add_command(command)


@main.command(epilog="Example: snoopi-rt prompts presets.txt --bundle my-bundle")
@click.argument("file", type=click.Path(path_type=Path))
@prompt_file_options
@bundle_option
@engine_option
@precision_option
@threads_option
def prompts(
    file: Path,
    kind: str | None,
    ignore_columns: bool,
    bundle: str | None,
    engine: str,
    precision: str | None,
    threads: int | None,
) -> None:
    """Encode the prompts and negative prompts of a file once, so that no later run needs the text encoder for them.

    FILE is as for generate --prompts; - is standard input.
    """
    from snoopi_rt.batch.prompt_file import PromptFile, texts_of
    from snoopi_rt.pipeline import load

    new = kept = refused = 0
    with progress_line() as progress, PromptFile(file, kind, ignore_columns) as rows:
        count = rows.judge().rows
        with load(bundle, engine, precision, threads, True, told(progress)) as pipe:
            for number, place, job in rows.rows():
                progress["doing"] = f"prompt {number} of {count}"
                try:
                    for text in texts_of(job):
                        if pipe.keep(text):
                            new += 1
                        else:
                            kept += 1
                except InputError as error:
                    refused += 1
                    click.echo(visible(f"error: {file} {place}: {error}"), err=True)
    click.echo(f"{new} new, {kept} kept before")
    if refused:
        click.get_current_context().exit(2)


@main.command(epilog="Example: snoopi-rt build --engine tensorrt --bundle my-bundle")
@bundle_option
@click.option(
    "--engine",
    required=True,
    metavar="NAME",
    shell_complete=completed_by(engines),
    help="cpu, openvino, cuda or tensorrt, if the bundle serves it.",
)
@precision_option
@threads_option
def build(bundle: str | None, engine: str, precision: str | None, threads: int | None) -> None:
    """Compile a bundle for an engine and draw one image, so that no later start on this machine waits for it."""
    from snoopi_rt.cache import Cache
    from snoopi_rt.pipeline import load

    start, before = time.monotonic(), Cache().sizes()["engines"]
    with ExitStack() as bars:
        bar: Any = None

        def progress(what: str, share: float) -> None:
            nonlocal bar
            if bar is None or bar.label != what:
                bars.close()
                bar = bars.enter_context(click.progressbar(length=1000, label=what, file=sys.stderr, hidden=not sys.stderr.isatty()))
            bar.update(max(0, round(1000 * share) - bar.pos))

        with load(bundle, engine, precision, threads, progress=progress) as pipe:
            provider = pipe.warmup().provider
    if problem := Cache().problem():
        raise EngineError(f"nothing was kept in {Cache().path}: {problem}")
    new = (Cache().sizes()["engines"] - before) / 1e6
    click.echo(f"ready on {provider} after {time.monotonic() - start:.0f} s, {new:.1f} MB new in {quote(Cache().path)}")


@main.command(epilog="Example: snoopi-rt info image.png")
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--verify", is_flag=True, help="Hash every file of the bundle again.")
@click.option("--vocabulary", is_flag=True, help="List what the bundle's model knows.")
@click.option("--json", "as_json", is_flag=True, help="With --vocabulary: one line of JSON.")
def info(path: Path | None, verify: bool, vocabulary: bool, as_json: bool) -> None:
    """Say what a bundle holds, or print the command that made an image. Without PATH: the bundle that came with snoopi-rt."""
    from snoopi_rt import image
    from snoopi_rt.bundle.bundle import MANIFEST, Bundle
    from snoopi_rt.bundle.typed_json import to_json
    from snoopi_rt.bundle.verify import find_folder
    from snoopi_rt.cache import Cache
    from snoopi_rt.engines import conflict, installed
    from snoopi_rt.files import sha256
    from snoopi_rt.pipeline import EMBEDDED

    if as_json and not vocabulary:
        raise InputError("--json goes with --vocabulary")
    if path is not None and not os.path.exists(path):
        raise InputError(f"{path}: no such file or folder")
    if path is not None and os.path.isfile(path):
        if vocabulary:
            raise InputError(f"--vocabulary is of a bundle's folder, and {quote(path)} is a file")
        made, manifest = image.read_metadata(path), EMBEDDED / MANIFEST
        hash = made.get("bundle_hash", "unknown")
        if manifest.is_file() and hash == sha256(manifest):
            click.echo(image.command(made, None))
            return
        folder = find_folder(hash, Cache())
        click.echo(image.command(made, folder or "FOLDER"))
        if folder is None:
            needed = f"bundle {quote(made.get('bundle', 'unknown'))} (hash {quote(hash)})"
            click.echo(f"put the folder of {needed} in the place of FOLDER: no such bundle was loaded here", err=True)
        return
    bundle = Bundle.load(EMBEDDED if path is None else path)
    if verify:
        bundle.verify()
    if vocabulary:
        known = bundle.vocabulary
        lines = known.described().splitlines() if known else [f"bundle {bundle.name!r} names no vocabulary"]
        click.echo(json_line(known and to_json(known)) if as_json else "\n".join(map(visible, lines)))
        return
    click.echo(bundle.described())
    click.echo(f"engines installed here: {', '.join(installed()) or 'none'}{conflict()}")


@main.command(epilog="Example: snoopi-rt cache --clear --yes")
@click.option("--clear", is_flag=True, help="Remove all that is kept, after a question.")
@click.option("--yes", is_flag=True, help="With --clear: do not ask.")
def cache(clear: bool, yes: bool) -> None:
    """Say what is kept between runs, and where."""
    from snoopi_rt.cache import Cache

    kept = Cache()
    if yes and not clear:
        raise InputError("--yes goes with --clear")
    if clear:
        before = sum(kept.sizes().values())
        if not yes:
            _ask(f"Remove {_size(before)} from {quote(kept.path)}?", "--clear removes what is kept: add --yes where nobody answers")
        kept.clear()
        left = sum(kept.sizes().values())
        click.echo(f"removed {_size(before - left)}")
        if left:
            raise OutputError(f"{_size(left)} could not be removed from {kept.path}: {kept.problem() or 'no permission, or in use'}")
    click.echo(quote(kept.path))
    if problem := kept.problem():
        click.echo(f"nothing is kept: {problem}")
    for kind, size in kept.sizes().items():
        click.echo(f"{kind:14}{_size(size):>12}")


def _ask(question: str, unanswered: str) -> None:
    """Returns after a yes. Raises click.Abort after a no, InputError where standard input ends without an answer."""
    try:
        agreed = click.confirm(question, err=True)
    except click.Abort:
        click.echo(err=True)  # the question's line ends here
        if sys.stdin.isatty():
            raise
        raise InputError(unanswered) from None
    if not agreed:
        raise click.Abort


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


@main.command(epilog="Example: snoopi-rt bench --engine cpu --engine openvino --runs 50")
@bundle_option
@click.option(
    "--engine",
    "names",
    multiple=True,
    metavar="NAME",
    shell_complete=completed_by(engines),
    help="May be given several times.  [default: all that can be used]",
)
@precision_option
@threads_option
@click.option("--runs", type=int, metavar="N", help="Images for each figure.  [default: 20, fewer where they are slow]")
def bench(bundle: str | None, names: tuple[str, ...], precision: str | None, threads: int | None, runs: int | None) -> None:
    """Measure each stage, the cold start and the memory, and remember the fastest engine; the last line is one JSON document."""
    from snoopi_rt.bundle.bundle import Bundle
    from snoopi_rt.pipeline import EMBEDDED
    from snoopi_rt.runtime.auto_engine import usable
    from snoopi_rt.runtime.bench import bench as measure
    from snoopi_rt.runtime.bench import table, verdict

    opened = Bundle.load(bundle or EMBEDDED)
    document = measure(opened, list(names) or usable(opened), precision, threads, runs, lambda line: click.echo(line, err=True))
    click.echo(table(document))
    click.echo(visible(verdict(document)))
    click.echo(json.dumps(document))
