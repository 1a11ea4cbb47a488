"""`snoopi-rt generate`: one prompt, or a file of them."""

import sys
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from snoopi_rt.cli.options import (
    Seed,
    Size,
    bundle_option,
    engine_option,
    once,
    precision_option,
    progress_line,
    prompt_file_options,
    ray_options,
    ray_workers,
    report_compiling,
    worker_threads_option,
)
from snoopi_rt.cli.prompt_input import example, read_prompt
from snoopi_rt.errors import InputError
from snoopi_rt.shell import quote

if TYPE_CHECKING:
    from snoopi_rt.batch.prompt_file import PromptFile
    from snoopi_rt.batch.ray import Workers
    from snoopi_rt.batch.runner import Draw


class Scales(click.ParamType):
    """One scale, or several separated by commas, without duplicates."""

    name = "X[,X...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(dict.fromkeys(float(part) + 0.0 for part in value.split(",")))  # + 0.0: -0 is 0
        except ValueError:
            raise InputError(f"negative scale {value!r}: give a number, or several such as 0,0.5,1") from None


@click.command(epilog='Example: snoopi-rt generate "a red apple on a blue background" --neg blurry --seed 7 -o apple.png')
@click.argument("prompt", required=False)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Instead of PROMPT, draw one image per row of a .txt, .csv, .tsv, .json, .jsonl or .parquet file with the columns prompt, "
    "negative_prompt, negative_scale and seed; - is standard input.",
)
@prompt_file_options
@click.option("--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Output folder for --prompts: the images and their index.")
@click.option("--neg", metavar="TEXT", multiple=True, callback=once, help="Negative prompt: what not to draw.")
@click.option(
    "--neg-scale",
    "scales",
    type=Scales(),
    metavar="X[,X...]",
    help="Strength of the negative prompt; several: the same seed at each, in files named NAME-SEED-SCALE.  [default: the bundle's]",
)
@click.option(
    "--seed",
    type=Seed(),
    metavar="N",
    help="Seed of the first image; the next has N + 1.  [default: random, and printed; with --prompts: 0]",
)
@click.option("-n", "count", type=int, default=1, metavar="N", help="Number of images; if several, they are named NAME-SEED.")
@click.option("-o", "--output", metavar="FILE|FOLDER/|-", help="File, folder, or standard output.  [default: PROMPT-SEED]")
@click.option(
    "--format",
    type=click.Choice(["png", "jpg", "jpeg", "webp"], case_sensitive=False),
    help="Image format.  [default: by the file's ending, or else png]",
)
@click.option("--side-by-side", is_flag=True, help="Write one image that shows the result without --neg and with it.")
@click.option("--open", "show", is_flag=True, help="Open the image in a viewer.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON per image.")
@click.option("--size", type=Size(), help="Width and height in pixels, such as 768x512.  [default: the bundle's first]")
@click.option("--truncate", is_flag=True, help="Cut prompts that are too long.")
@click.option("--force", is_flag=True, help="Overwrite the file that -o names.")
@bundle_option
@engine_option
@precision_option
@worker_threads_option
@ray_options
def generate(
    prompt: str | None,
    prompts: Path | None,
    prompts_format: str | None,
    ignore_columns: bool,
    out: Path | None,
    bundle: str | None,
    engine: str,
    precision: str | None,
    threads: int | None,
    ray: bool,
    workers: tuple[int, int] | None,
    gpus: float | None,
    **image_options: Any,
) -> None:
    """Draw PROMPT to an image file, or every row of a prompt file to a folder; an interrupted folder is resumed.

    If PROMPT is - or missing, it is read from standard input; if that is empty, one of the bundle's examples is drawn.
    """
    load_options: dict[str, Any] = {"bundle": bundle, "engine": engine, "precision": precision, "threads": threads}
    if prompts is None and out is None:
        if prompts_format is not None or ignore_columns:
            raise InputError("--prompts-format and --ignore-columns go with --prompts FILE")
        if ray:
            raise InputError("--ray is for --prompts: one PROMPT is drawn faster without it")
        ray_workers(ray, workers, gpus, threads)
        _draw_prompt(prompt, load_options, **image_options)
        return
    if prompt is not None:
        raise InputError(
            "--out goes with --prompts: use -o for one PROMPT" if prompts is None else "give a PROMPT or --prompts FILE, not both"
        )
    if prompts is None or out is None:
        raise InputError("--prompts FILE and --out FOLDER go together; use -o for one PROMPT")
    from snoopi_rt.batch.prompt_file import PromptFile

    batch_options = _batch_options(**image_options)
    workers_on_ray = ray_workers(ray, workers, gpus, threads)
    with ExitStack() as stack:
        with progress_line("reading prompts"):
            prompt_file = stack.enter_context(PromptFile(prompts, prompts_format, ignore_columns))
            rows = prompt_file.check().rows
        _draw_file(prompt_file, rows, out, batch_options, load_options, workers_on_ray)


def _draw_prompt(
    prompt: str | None,
    load_options: dict[str, Any],
    neg: str | None,
    scales: tuple[float, ...] | None,
    seed: int | None,
    count: int,
    output: str | None,
    format: str | None,
    side_by_side: bool,
    show: bool,
    as_json: bool,
    size: tuple[int, int] | None,
    truncate: bool,
    force: bool,
) -> None:
    """Draws one prompt to image files."""
    from snoopi_rt.bundle.bundle import Bundle
    from snoopi_rt.cli.output import Files, PromptImages, report, warn
    from snoopi_rt.cli.output import show as show_image
    from snoopi_rt.loading import load
    from snoopi_rt.pipeline import EMBEDDED
    from snoopi_rt.request import MAX_IMAGES, integer, seeds_from

    integer("n", count, 1, MAX_IMAGES)
    seeds = tuple(seeds_from(seed, count))
    text = read_prompt(prompt)
    if text is None:
        text = example(Bundle.load(load_options["bundle"] or EMBEDDED), seeds[0])
        click.echo(f"no prompt given, drawing an example: {quote(text)}", err=True)
    if side_by_side and not (neg or "").strip():
        raise InputError("--side-by-side compares the image without and with a negative prompt: give --neg TEXT")
    if output == "-" and show:
        raise InputError("--open needs a file: -o - writes none")
    images = PromptImages(text, neg, scales or (None,), seeds, size, truncate, side_by_side)
    files = Files(output, format, images, force)
    with progress_line() as progress, load(**load_options, low_memory=True, progress=report_compiling(progress)) as pipe:
        files.check_format(images.check(pipe), images)
        progress["doing"], written = "drawing", []
        for index, drawn in enumerate(images.draw(pipe)):
            if index == 0:
                warn(drawn.fields["warnings"], pipe.bundle)
            path = files.save(index, drawn)
            report(drawn, path, as_json, show_scale=len(images.scales) > 1 and not side_by_side)
            written += [] if path is None else [path]
            progress["doing"] = f"drawing, {index + 1} written"
    for path in written if show else ():
        show_image(path)


def _batch_options(
    neg: str | None,
    scales: tuple[float, ...] | None,
    seed: int | None,
    format: str | None,
    size: tuple[int, int] | None,
    truncate: bool,
    count: int,
    **single: Any,
) -> dict[str, Any]:
    """The options of `generate` as settings of a Batch. Raises InputError for those that are for one prompt."""
    spelling = {"output": "-o", "side_by_side": "--side-by-side", "show": "--open", "as_json": "--json", "force": "--force"}
    for option in [*(["-n"] if count != 1 else []), *(spelling[name] for name, value in single.items() if value)]:
        raise InputError(f"{option} is for one PROMPT: with --prompts each row is one image, listed in index.jsonl")
    if len(scales or ()) > 1:
        raise InputError("several scales are for one PROMPT: with --prompts each row is one image")
    scale = scales[0] if scales else None
    return {"seed": seed or 0, "negative": neg, "scale": scale, "size": size, "truncate": truncate, "format": format or "png"}


def _draw_file(
    prompts: "PromptFile",
    rows: int,
    out: Path,
    batch_options: dict[str, Any],
    load_options: dict[str, Any],
    workers: "Workers | None",
) -> None:
    """Draws the rows of a file to a folder."""
    from snoopi_rt.batch.runner import Batch, draw_here
    from snoopi_rt.loading import load
    from snoopi_rt.request import seeds_from

    if str(out) == "-":
        raise InputError("--out is a folder: a batch cannot be written to standard output")
    seeds_from(batch_options["seed"], max(rows, 1))
    batch = Batch(prompts, out, **batch_options)
    batch.check_folder()
    draw: Draw = draw_here
    with progress_line() as progress:
        pipe = load(**load_options, low_memory=workers is not None, progress=report_compiling(progress))
        if workers is None:
            pipe.warmup()
        else:
            from snoopi_rt.batch.ray import draw_on_ray, start_ray

            start_ray()
            # Workers have another working directory.
            worker_options = {
                "bundle": str(Path(load_options["bundle"]).resolve()) if load_options["bundle"] else None,
                "threads": load_options["threads"] or 1,
            }
            draw = partial(draw_on_ray, load_options | worker_options, workers)
    start = time.monotonic()
    try:
        with pipe, click.progressbar(length=rows, label="images", show_pos=True, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
            outcome = batch.run(pipe, bar.update, draw)
    except KeyboardInterrupt:
        with suppress(OSError):  # a terminal that is gone, after SIGHUP
            click.echo("stopped: the same command draws the rest", err=True)
        raise
    seconds = time.monotonic() - start
    pace = f" ({outcome.drawn / seconds:.1f} images per second)" if outcome.drawn else ""
    click.echo(f"{outcome.drawn} drawn{pace}, {outcome.kept} already there, in {quote(batch.out)}")
    if outcome.warned:
        from snoopi_rt.cli.output import warn

        rows_warned = "1 row asks" if outcome.warned == 1 else f"{outcome.warned} rows ask"
        warn([f"{rows_warned} for something the model cannot draw, listed in index.jsonl; {outcome.warning}"], pipe.bundle)
    if outcome.failed:
        rows_failed = "1 row" if outcome.failed == 1 else f"{outcome.failed} rows"
        click.echo(f"error: {rows_failed} could not be drawn: see error in {quote(batch.out / 'index.jsonl')}", err=True)
        click.get_current_context().exit(2)
