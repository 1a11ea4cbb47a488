"""The command line: each command parses, calls one function and prints. What is heavy is imported inside the commands."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from snoopi_rt import __version__
from snoopi_rt.cli_build import data, merge, train
from snoopi_rt.cli_eval import evaluate
from snoopi_rt.cli_export import export, presets
from snoopi_rt.cli_serve import serve
from snoopi_rt.engines.base import EngineError, InputError, SnoopiError

if TYPE_CHECKING:
    from snoopi_rt.batch import Batch

PATIENCE = 2.0
"""Seconds without a word on standard error."""


class Commands(click.Group):
    """Known errors are one line on standard error: exit code 2 for what was asked wrongly, 1 for the rest."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Takes --debug behind the command too, where people add it to a line that failed."""
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(word for word in args[:end] if word != "--debug"), *args[end:]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SnoopiError as error:
            if ctx.params["debug"]:
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(2 if isinstance(error, InputError) else 1)


class Size(click.ParamType):
    """WIDTHxHEIGHT in pixels, to (height, width)."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        from snoopi_rt.request import parse_size

        return parse_size(value)


bundle_option = click.option("--bundle", metavar="FOLDER", help="The bundle's folder.  [default: the one that came with snoopi-rt]")
engine_option = click.option(
    "--engine",
    default="auto",
    metavar="NAME",
    help="cpu, openvino, cuda or tensorrt, if the bundle serves it; auto: the fastest by bench, else cpu.",
)
precision_option = click.option(
    "--precision",
    metavar="NAME",
    help="A precision of the bundle, such as fp32, or one a graph: generator=int8,decoder=fp16.  [default: the bundle's first]",
)
threads_option = click.option("--threads", type=int, metavar="N", help="CPU threads.  [default: one for each core it may use]")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show where an error comes from.")
def main(debug: bool) -> None:
    """One-step text-to-image with negative prompts."""


for command in (data, train, merge, evaluate, export, presets, serve):
    main.add_command(command)


@main.command(epilog='Example: snoopi-rt generate "a red apple on a blue background" --neg blurry --seed 7 -o apple.png')
@click.argument("prompt", required=False)
@click.option(
    "--prompts", type=click.Path(path_type=Path), metavar="FILE", help="Instead of PROMPT: .txt, .jsonl, .csv or .parquet, a row an image."
)
@click.option("--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Where the images of --prompts and their index go.")
@click.option("--neg", metavar="TEXT", help="The negative prompt: what not to draw.")
@click.option("--neg-scale", type=float, metavar="X", help="How strongly it counts.  [default: the bundle's]")
@click.option("--seed", type=int, metavar="N", help="The first image's seed; the next has N + 1.  [default: drawn, and printed]")
@click.option("-n", "count", type=int, default=1, metavar="N", help="How many images; more than one are written as NAME-SEED.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="image", help="The file or its folder; no ending means that of --format."
)
@click.option("--format", type=click.Choice(["png", "jpeg", "webp"]), help="The file's format.  [default: from the name, else png]")
@click.option("--size", type=Size(), help="Width and height in pixels, such as 768x512.  [default: the bundle's first]")
@click.option("--truncate", is_flag=True, help="Cut a prompt that is too long.")
@click.option("--force", is_flag=True, help="Replace files that are there.")
@bundle_option
@engine_option
@precision_option
@threads_option
def generate(
    prompt: str | None,
    prompts: Path | None,
    out: Path | None,
    neg: str | None,
    neg_scale: float | None,
    seed: int | None,
    count: int,
    output: Path,
    format: str | None,
    size: tuple[int, int] | None,
    truncate: bool,
    force: bool,
    bundle: str | None,
    engine: str,
    precision: str | None,
    threads: int | None,
) -> None:
    """Draw PROMPT into an image file, or the rows of a file into a folder; a folder that was left half done is finished."""
    if (prompt is None) == (prompts is None) or (prompts is None) != (out is None):
        raise InputError("give a PROMPT, or --prompts FILE and --out FOLDER")
    if prompts is not None and count != 1:
        raise InputError("-n is for one PROMPT: a row of --prompts is one image")
    if prompts is not None and out is not None:
        from snoopi_rt.batch import Batch

        _batch(Batch(prompts, out, seed or 0, neg, neg_scale, size, truncate, format or "png"), bundle, engine, precision, threads)
        return
    assert prompt is not None
    from snoopi_rt import image
    from snoopi_rt.pipeline import load
    from snoopi_rt.request import SEEDS, draw_seed, integer

    integer("n", count, 1)
    first = draw_seed() if seed is None else integer("seed", seed, 0)
    seeds = [(first + index) % SEEDS for index in range(count)]
    output = _with_ending(output, format)
    paths = [output] if count == 1 else [output.with_stem(f"{output.stem}-{each}") for each in seeds]
    for path in paths:
        image.check_writable(path, force)
    with _progress() as progress, load(bundle, engine, precision, threads, True, _told(progress)) as pipe:
        for start in range(0, count, pipe.max_batch):
            progress["doing"] = f"image {start + 1} of {count}"
            batch = paths[start : start + pipe.max_batch]
            result = pipe.generate(prompt, neg, neg_scale, first + start, len(batch), size, truncate)
            for index, path in enumerate(batch):
                image.save(result.images[index], path, result.metadata(index), force)
                click.echo(f"{path}  seed {result.seeds[index]}")


@main.command(epilog="Example: snoopi-rt prompts --bundle my-bundle --file presets.txt")
@click.option("--file", type=click.Path(path_type=Path), required=True, help="A prompt a line; blank lines and # comments are skipped.")
@bundle_option
@engine_option
@precision_option
@threads_option
def prompts(file: Path, bundle: str | None, engine: str, precision: str | None, threads: int | None) -> None:
    """Encode the prompts of a file once, so that no later run needs the text encoder for them."""
    from snoopi_rt.pipeline import load
    from snoopi_rt.request import prompt_lines

    asked, new, refused = prompt_lines(file), 0, 0
    with _progress() as progress, load(bundle, engine, precision, threads, True, _told(progress)) as pipe:
        for done, (number, prompt) in enumerate(asked.items(), 1):
            progress["doing"] = f"prompt {done} of {len(asked)}"
            try:
                new += pipe.keep(prompt)
            except InputError as error:
                refused += 1
                click.echo(f"error: {file} line {number}: {error}", err=True)
    click.echo(f"{new} new, {len(asked) - refused - new} kept before")
    if refused:
        click.get_current_context().exit(2)


@main.command(epilog="Example: snoopi-rt build --engine tensorrt --bundle my-bundle")
@bundle_option
@click.option("--engine", required=True, metavar="NAME", help="cpu, openvino, cuda or tensorrt, if the bundle serves it.")
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
                bar = bars.enter_context(click.progressbar(length=1000, label=what, file=sys.stderr))
            bar.update(max(0, round(1000 * share) - bar.pos))

        with load(bundle, engine, precision, threads, progress=progress) as pipe:
            provider = pipe.warmup().provider
    if problem := Cache().problem():
        raise EngineError(f"nothing was kept in {Cache().path}: {problem}")
    new = (Cache().sizes()["engines"] - before) / 1e6
    click.echo(f"ready on {provider} after {time.monotonic() - start:.0f} s, {new:.1f} MB new in {Cache().path}")


@main.command(epilog="Example: snoopi-rt info image.png")
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--verify", is_flag=True, help="Hash every file of the bundle again.")
def info(path: Path | None, verify: bool) -> None:
    """Say what a bundle holds, or print the command that made an image. Without PATH: the bundle that came with snoopi-rt."""
    from snoopi_rt import image
    from snoopi_rt.bundle import MANIFEST, Bundle
    from snoopi_rt.engines import conflict, installed
    from snoopi_rt.files import sha256
    from snoopi_rt.pipeline import EMBEDDED

    if path is not None and not os.path.exists(path):
        raise InputError(f"{path}: no such file or folder")
    if path is not None and os.path.isfile(path):
        made, manifest = image.read_metadata(path), EMBEDDED / MANIFEST
        foreign = not manifest.is_file() or made.get("bundle_hash") != sha256(manifest)
        click.echo(image.command(made, foreign))
        if foreign:
            name, hash = made.get("bundle", "unknown"), made.get("bundle_hash", "unknown")
            click.echo(f"needs the bundle {name} (hash {hash}): put its folder after --bundle", err=True)
        return
    bundle = Bundle.load(EMBEDDED if path is None else path)
    if verify:
        bundle.verify()
    click.echo(bundle.described())
    click.echo(f"engines installed here: {', '.join(installed()) or 'none'}{conflict()}")


@main.command(epilog="Example: snoopi-rt cache --clear")
@click.option("--clear", is_flag=True, help="Remove all that is kept.")
def cache(clear: bool) -> None:
    """Say what is kept between runs, and where."""
    from snoopi_rt.cache import Cache

    kept = Cache()
    if clear:
        kept.clear()
    click.echo(kept.path)
    if problem := kept.problem():
        click.echo(f"nothing is kept: {problem}")
    for kind, size in kept.sizes().items():
        click.echo(f"{kind:14}{size / 1e6:10.1f} MB")


@main.command(epilog="Example: snoopi-rt bench --engine cpu --engine openvino --runs 50")
@bundle_option
@click.option("--engine", "engines", multiple=True, metavar="NAME", help="May be given several times.  [default: all that can be used]")
@precision_option
@threads_option
@click.option("--runs", type=int, metavar="N", help="Images for each figure.  [default: 20, fewer where they are slow]")
def bench(bundle: str | None, engines: tuple[str, ...], precision: str | None, threads: int | None, runs: int | None) -> None:
    """Measure each stage, the cold start and the memory; the last line is one JSON document."""
    from snoopi_rt.bench import bench as measure
    from snoopi_rt.bench import table
    from snoopi_rt.bundle import Bundle
    from snoopi_rt.choice import usable
    from snoopi_rt.pipeline import EMBEDDED

    opened = Bundle.load(bundle or EMBEDDED)
    document = measure(opened, list(engines) or usable(opened), precision, threads, runs, lambda line: click.echo(line, err=True))
    click.echo(table(document))
    click.echo(json.dumps(document))


def _batch(batch: "Batch", bundle: str | None, engine: str, precision: str | None, threads: int | None) -> None:
    from snoopi_rt.pipeline import load
    from snoopi_rt.rows import read_rows

    count = sum(1 for _ in read_rows(batch.prompts))
    with _progress() as progress:
        pipe = load(bundle, engine, precision, threads, False, _told(progress)).warmup()
    start = time.monotonic()
    with pipe, click.progressbar(length=count, label="images", show_pos=True, file=sys.stderr) as bar:
        outcome = batch.run(pipe, bar.update)
    seconds = time.monotonic() - start
    click.echo(f"{outcome.drawn} drawn ({outcome.drawn / seconds:.1f} images a second), {outcome.kept} there before, in {batch.out}")
    if outcome.failed:
        click.echo(f"error: {outcome.failed} rows could not be drawn: see error in {batch.out / 'index.jsonl'}", err=True)
        click.get_current_context().exit(2)


def _with_ending(output: Path, format: str | None) -> Path:
    from snoopi_rt.image import FORMATS

    if os.path.isdir(output):
        output /= "image"
    if not output.suffix:
        return output.with_suffix(f".{format or 'png'}")
    if format is not None and FORMATS.get(output.suffix.lower()) != format:
        raise InputError(f"{output} does not end as {format} does: leave out --format, or the ending")
    return output


def _told(progress: dict[str, str]) -> Callable[[str, float], None]:
    """Tells `_progress` of what an engine compiles."""

    def tell(what: str, share: float) -> None:
        progress["doing"] = f"{what}, {share:.0%}"

    return tell


@contextmanager
def _progress() -> Iterator[dict[str, str]]:
    """Says every two seconds on standard error what is being done: quick work is silent, slow work is not."""
    progress, done, start = {"doing": "loading"}, threading.Event(), time.monotonic()

    def talk() -> None:
        while not done.wait(PATIENCE):
            click.echo(f"{progress['doing']} ({time.monotonic() - start:.0f} s)", err=True)

    threading.Thread(target=talk, daemon=True).start()
    try:
        yield progress
    finally:
        done.set()
