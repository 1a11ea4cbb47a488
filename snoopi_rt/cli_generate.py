"""The command that draws: a prompt, or a file of them."""

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from snoopi_rt.cli_options import (
    Seed,
    Size,
    bundle_option,
    engine_option,
    precision_option,
    progress_line,
    ray_options,
    ray_workers,
    threads_option,
    told,
)
from snoopi_rt.engines.base import InputError

if TYPE_CHECKING:
    from snoopi_rt.batch import Batch
    from snoopi_rt.on_ray import Workers


@click.command(epilog='Example: snoopi-rt generate "a red apple on a blue background" --neg blurry --seed 7 -o apple.png')
@click.argument("prompt", required=False)
@click.option(
    "--prompts", type=click.Path(path_type=Path), metavar="FILE", help="Instead of PROMPT: .txt, .jsonl, .csv or .parquet, a row an image."
)
@click.option("--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Where the images of --prompts and their index go.")
@click.option("--neg", metavar="TEXT", help="The negative prompt: what not to draw.")
@click.option("--neg-scale", type=float, metavar="X", help="How strongly it counts.  [default: the bundle's]")
@click.option("--seed", type=Seed(), metavar="N", help="The first image's seed; the next has N + 1.  [default: drawn, and printed]")
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
@ray_options
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
    ray: bool,
    workers: tuple[int, int] | None,
    gpus: float | None,
) -> None:
    """Draw PROMPT into an image file, or the rows of a file into a folder; a folder that was left half done is finished."""
    if (prompt is None) == (prompts is None) or (prompts is None) != (out is None):
        raise InputError("give a PROMPT, or --prompts FILE and --out FOLDER")
    if prompts is not None and count != 1:
        raise InputError("-n is for one PROMPT: a row of --prompts is one image")
    if prompts is not None and out is not None:
        from snoopi_rt.batch import Batch

        batch = Batch(prompts, out, seed or 0, neg, neg_scale, size, truncate, format or "png")
        opening = {"bundle": bundle, "engine": engine, "precision": precision, "threads": threads}
        _draw_batch(batch, opening, ray_workers(ray, workers, gpus, threads))
        return
    if ray:
        raise InputError("--ray is for --prompts: one PROMPT is drawn sooner here")
    ray_workers(ray, workers, gpus, threads)
    assert prompt is not None
    from snoopi_rt import image
    from snoopi_rt.pipeline import load
    from snoopi_rt.request import MAX_IMAGES, SEEDS, draw_seed, integer

    integer("n", count, 1, MAX_IMAGES)
    first = draw_seed() if seed is None else seed
    seeds = [(first + index) % SEEDS for index in range(count)]
    output = _with_ending(output, format)
    paths = [output] if count == 1 else [output.with_stem(f"{output.stem}-{each}") for each in seeds]
    for path in paths:
        image.check_writable(path, force)
    with progress_line() as progress, load(bundle, engine, precision, threads, True, told(progress)) as pipe:
        for start in range(0, count, pipe.max_batch):
            progress["doing"] = f"image {start + 1} of {count}"
            files = paths[start : start + pipe.max_batch]
            result = pipe.generate(prompt, neg, neg_scale, seeds[start], len(files), size, truncate)
            for index, path in enumerate(files):
                image.save(result.images[index], path, result.metadata(index), force)
                click.echo(f"{path}  seed {result.seeds[index]}")


def _draw_batch(batch: "Batch", opening: dict[str, Any], workers: "Workers | None") -> None:
    from snoopi_rt.batch import draw_here
    from snoopi_rt.pipeline import load
    from snoopi_rt.rows import read_rows

    count, draw = sum(1 for _ in read_rows(batch.prompts)), draw_here
    with progress_line() as progress:
        pipe = load(**opening, low_memory=workers is not None, progress=told(progress))
        if workers is None:
            pipe.warmup()
        else:
            from snoopi_rt.on_ray import draw_on_ray, start_ray

            start_ray()
            # Elsewhere this process's folder is another.
            there = {"bundle": str(Path(opening["bundle"]).resolve()) if opening["bundle"] else None, "threads": opening["threads"] or 1}
            draw = partial(draw_on_ray, opening | there, workers)
    start = time.monotonic()
    with pipe, click.progressbar(length=count, label="images", show_pos=True, file=sys.stderr) as bar:
        outcome = batch.run(pipe, bar.update, draw)
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
