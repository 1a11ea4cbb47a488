"""The command that draws: a prompt, or a file of them."""

import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from snoopi_rt.cli.options import (
    Seed,
    Size,
    bundle_option,
    engine_option,
    precision_option,
    progress_line,
    prompt_file_options,
    ray_options,
    ray_workers,
    threads_option,
    told,
)
from snoopi_rt.cli.prompt import example, read_prompt
from snoopi_rt.errors import InputError
from snoopi_rt.shell import quote

if TYPE_CHECKING:
    from snoopi_rt.batch.ray import Workers
    from snoopi_rt.batch.runner import Batch, Draw


class Scales(click.ParamType):
    """X, or several with commas between them, to numbers, each once."""

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
    help="Instead of PROMPT, one image per row: .txt, .csv, .tsv, .json, .jsonl or .parquet; - is standard input.",
)
@prompt_file_options
@click.option("--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Where the images of --prompts and their index go.")
@click.option("--neg", metavar="TEXT", help="The negative prompt: what not to draw.")
@click.option(
    "--neg-scale",
    "scales",
    type=Scales(),
    metavar="X[,X...]",
    help="How strongly it counts; several draw the same seed at each.  [default: the bundle's]",
)
@click.option("--seed", type=Seed(), metavar="N", help="The first image's seed; the next has N + 1.  [default: drawn, and printed]")
@click.option("-n", "count", type=int, default=1, metavar="N", help="How many images; more than one are written as NAME-SEED.")
@click.option("-o", "--output", metavar="FILE|FOLDER/|-", help="The file, a folder, or standard output.  [default: PROMPT-SEED]")
@click.option(
    "--format",
    type=click.Choice(["png", "jpg", "jpeg", "webp"], case_sensitive=False),
    help="The file's format.  [default: from the name, else png]",
)
@click.option("--side-by-side", is_flag=True, help="One file with the image without --neg, then with it.")
@click.option("--open", "show", is_flag=True, help="Show the image.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON per image.")
@click.option("--size", type=Size(), help="Width and height in pixels, such as 768x512.  [default: the bundle's first]")
@click.option("--truncate", is_flag=True, help="Cut a prompt that is too long.")
@click.option("--force", is_flag=True, help="Replace a file of the name that -o gives.")
@bundle_option
@engine_option
@precision_option
@threads_option
@ray_options
def generate(
    prompt: str | None,
    prompts: Path | None,
    kind: str | None,
    ignore_columns: bool,
    out: Path | None,
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
    bundle: str | None,
    engine: str,
    precision: str | None,
    threads: int | None,
    ray: bool,
    workers: tuple[int, int] | None,
    gpus: float | None,
) -> None:
    """Draw PROMPT into an image file, or the rows of a file into a folder; a folder that was left half done is finished.

    PROMPT - is standard input, which is also read where there is none; if it is empty, one of the bundle's examples is drawn.
    """
    load_options: dict[str, Any] = {"bundle": bundle, "engine": engine, "precision": precision, "threads": threads}
    if prompts is not None or out is not None:
        from snoopi_rt.batch.prompt_file import PromptFile
        from snoopi_rt.batch.runner import Batch

        if prompt is not None:
            raise InputError(
                "--out goes with --prompts: one PROMPT has -o" if prompts is None else "give a PROMPT, or --prompts FILE, not both"
            )
        from snoopi_rt.request import seeds_from

        if prompts is None or out is None:
            raise InputError("--prompts FILE and --out FOLDER go together; -o is for one PROMPT")
        for option, used in (
            ("-n", count != 1),
            ("-o", output),
            ("--side-by-side", side_by_side),
            ("--open", show),
            ("--json", as_json),
            ("--force", force),
        ):
            if used:
                raise InputError(f"{option} is for one PROMPT: of --prompts, each row is one image, listed in index.jsonl")
        if len(scales or ()) > 1:
            raise InputError("several scales are for one PROMPT: of --prompts, each row is one image")
        workers_on_ray = ray_workers(ray, workers, gpus, threads)
        with ExitStack() as stack:
            with progress_line("reading prompts"):
                rows = stack.enter_context(PromptFile(prompts, kind, ignore_columns))
                count = rows.judge().rows
            if str(out) == "-":
                raise InputError("--out is a folder: a batch does not go to standard output")
            seeds_from(seed or 0, max(count, 1))
            batch = Batch(rows, out, seed or 0, neg, scales[0] if scales else None, size, truncate, format or "png")
            _draw_batch(batch, count, load_options, workers_on_ray)
        return
    if kind is not None or ignore_columns:
        raise InputError("--prompts-format and --ignore-columns go with --prompts FILE")
    if ray:
        raise InputError("--ray is for --prompts: one PROMPT is drawn sooner here")
    ray_workers(ray, workers, gpus, threads)
    from snoopi_rt.bundle.bundle import Bundle
    from snoopi_rt.cli.output import Drawing, Files, tell, warn
    from snoopi_rt.cli.output import show as show_picture
    from snoopi_rt.pipeline import EMBEDDED, load
    from snoopi_rt.request import MAX_IMAGES, integer, seeds_from

    integer("n", count, 1, MAX_IMAGES)
    seeds = tuple(seeds_from(seed, count))
    text = read_prompt(prompt)
    if text is None:
        text = example(Bundle.load(bundle or EMBEDDED), seeds[0])
        click.echo(f"no prompt, so an example: {quote(text)}", err=True)
    if side_by_side and not (neg or "").strip():
        raise InputError("--side-by-side shows the image without and with the negative prompt: give --neg TEXT")
    if output == "-" and show:
        raise InputError("--open shows a file: -o - writes none")
    drawing = Drawing(text, neg, scales or (None,), seeds, size, truncate, side_by_side)
    files = Files(output, format, drawing, force)
    with progress_line() as progress, load(**load_options, low_memory=True, progress=told(progress)) as pipe:
        files.check_format(drawing.check(pipe), drawing)
        progress["doing"], written = "drawing", []
        for index, picture in enumerate(drawing.pictures(pipe)):
            if index == 0:
                warn(picture.facts["warnings"], pipe.bundle)
            path = files.save(index, picture)
            tell(picture, path, as_json, scaled=len(drawing.scales) > 1 and not side_by_side)
            written += [] if path is None else [path]
            progress["doing"] = f"drawing, {index + 1} written"
    for path in written if show else ():
        show_picture(path)


def _draw_batch(batch: "Batch", count: int, load_options: dict[str, Any], workers: "Workers | None") -> None:
    from snoopi_rt.batch.runner import draw_here
    from snoopi_rt.pipeline import load

    batch.check_folder()
    draw: Draw = draw_here
    with progress_line() as progress:
        pipe = load(**load_options, low_memory=workers is not None, progress=told(progress))
        if workers is None:
            pipe.warmup()
        else:
            from snoopi_rt.batch.ray import draw_on_ray, start_ray

            start_ray()
            # Elsewhere this process's folder is another.
            there = {
                "bundle": str(Path(load_options["bundle"]).resolve()) if load_options["bundle"] else None,
                "threads": load_options["threads"] or 1,
            }
            draw = partial(draw_on_ray, load_options | there, workers)
    start = time.monotonic()
    with pipe, click.progressbar(length=count, label="images", show_pos=True, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        outcome = batch.run(pipe, bar.update, draw)
    seconds = time.monotonic() - start
    pace = f" ({outcome.drawn / seconds:.1f} images a second)" if outcome.drawn else ""
    click.echo(f"{outcome.drawn} drawn{pace}, {outcome.kept} there before, in {quote(batch.out)}")
    if outcome.warned:
        from snoopi_rt.cli.output import warn

        rows_warned = "1 row" if outcome.warned == 1 else f"{outcome.warned} rows"
        warn([f"{rows_warned} ask for what the model does not know, listed in index.jsonl; {outcome.warning}"], pipe.bundle)
    if outcome.failed:
        rows_failed = "1 row" if outcome.failed == 1 else f"{outcome.failed} rows"
        click.echo(f"error: {rows_failed} could not be drawn: see error in {quote(batch.out / 'index.jsonl')}", err=True)
        click.get_current_context().exit(2)
