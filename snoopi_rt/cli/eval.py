"""The commands that judge students: eval. Each measure is a command here and a file in export/evaluation, imported inside it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from snoopi_rt.cli.options import Group, Integer, Number, Seed, complete_bundle, folder_path, named_folder, say
from snoopi_rt.cli.torch_command import torch_command
from snoopi_rt.errors import InputError
from snoopi_rt.shell import quote, visible

if TYPE_CHECKING:
    from snoopi_rt.export.evaluation.measures import Plan

bundles_option = click.option(
    "--bundle",
    "bundles",
    multiple=True,
    metavar="[NAME=]FOLDER",
    shell_complete=complete_bundle,
    help="A bundle, or a student's weights; repeatable, measured side by side.  [default: the embedded bundle]",
)
evaluation_out_option = click.option(
    "--out",
    type=folder_path,
    default=Path("evaluation"),
    metavar="FOLDER",
    help="Output folder.",
)


@click.group("eval", cls=Group, epilog="Example: snoopi-rt eval small --bundle my-bundle")
def evaluate() -> None:
    """Measure what students can do."""


@evaluate.command(epilog="Example: snoopi-rt eval small --teacher weights/small/teacher --out out/evaluation")
@bundles_option
@click.option("--teacher", type=folder_path, metavar="FOLDER", help="Teacher to measure beside them, in 10 steps.")
@click.option("--decoder", type=folder_path, metavar="FOLDER", help="Decoder for the teacher's latents.  [default: its own vae]")
@click.option(
    "--references",
    type=folder_path,
    metavar="FOLDER",
    help="Folder that keeps features of real images and the teacher's figures, which take minutes.  [default: references in --out]",
)
@click.option("--quick", is_flag=True, help="Draw a few images of each kind, to see that it runs; the figures mean nothing.")
@click.option(
    "--measure", "measures", multiple=True, metavar="NAME", help="Only this measure, such as clean or removal; repeatable.  [default: all]"
)
@evaluation_out_option
def small(
    bundles: tuple[str, ...],
    teacher: Path | None,
    decoder: Path | None,
    references: Path | None,
    quick: bool,
    measures: tuple[str, ...],
    out: Path,
) -> None:
    """Judge the embedded model and others of its kind.

    Writes small.json, small.md, a plot, and, when everything is measured, sheets of uncurated images.
    """
    named: dict[str, Path | None] = dict(map(named_folder, bundles)) or {"embedded": None}
    if len(named) < len(bundles) or "teacher" in named:
        raise InputError("each bundle needs a name of its own: --bundle NAME=FOLDER gives it one")
    if decoder is not None and teacher is None:
        raise InputError("--decoder goes with --teacher")
    with torch_command("eval small", "export,train", out):
        from snoopi_rt.export.evaluation.report import unmet
        from snoopi_rt.export.evaluation.small.evaluate import QUICK, Extent
        from snoopi_rt.export.evaluation.small.evaluate import evaluate as measure

        extent = replace(QUICK if quick else Extent(), measures=measures)
        columns = measure(named, teacher, decoder, references or out / "references", out, extent, say)
    for name in named:
        rows = [row for row in columns[name] if row.goal is not None]
        click.echo(visible(f"{name}: {len(rows) - len(unmet(rows))} of {len(rows)} goals met"))
    sheets = "small.png" if measures else "small.png, natural.png, things.png and clean.png"
    click.echo(f"read {quote(out / 'small.md')}, and look at {sheets} beside it", err=True)


def subjects(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that all measures of image sets share: what is measured, on which prompts, with which weights."""
    options = (
        bundles_option,
        click.option(
            "--pipeline", "pipelines", multiple=True, metavar="[NAME=]FOLDER", help="A diffusers pipeline, run in PyTorch; repeatable."
        ),
        click.option("--images", "folders", multiple=True, metavar="[NAME=]FOLDER", help="Images made by another program; repeatable."),
        click.option(
            "--prompts",
            type=click.Path(path_type=Path),
            required=True,
            metavar="FILE",
            help="Prompts of the images, with optional columns style, negative_prompt, seed and file; or a folder with a file per style.",
        ),
        click.option(
            "--network-weights",
            "weights",
            multiple=True,
            metavar="NAME=PATH|ID",
            help="File, folder or hub id of a network's weights; --dry-run lists the names. Repeatable.",
        ),
        click.option(
            "--limit",
            type=Integer(1),
            metavar="N",
            help="Use at most N prompts, spread evenly over the styles; the measure's name then says so.",
        ),
        click.option("--seed", type=Seed(), default=0, metavar="N", help="Seed of the first image; the next has N + 1."),
        click.option("--neg-scale", "scale", type=Number(0), metavar="X", help="Strength of negative prompts.  [default: the bundle's]"),
        click.option("--steps", type=Integer(1), metavar="N", help="Steps of a --pipeline.  [default: its own]"),
        click.option(
            "--guidance-scale", "guidance", type=Number(0), metavar="X", help="Guidance scale of a --pipeline.  [default: its own]"
        ),
        click.option("--dry-run", is_flag=True, help="List what would be fetched, drawn and computed, and stop."),
        evaluation_out_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


reference_option = click.option("--reference", type=folder_path, required=True, metavar="FOLDER", help="Folder of real images.")


@evaluate.command(epilog="Example: snoopi-rt eval hps --bundle my-bundle --prompts HPDv2/benchmark --version 2.1")
@subjects
@click.option(
    "--version",
    type=click.Choice(["2.0", "2.1"]),
    multiple=True,
    help="Version of HPSv2; the scores of the two cannot be compared.  [default: both]",
)
def hps(version: tuple[str, ...], **options: Any) -> None:
    """Score images with HPSv2, per style and on average."""
    _measure("hps", tuple(f"hps-v{one}" for one in version or ("2.0", "2.1")), options)


@evaluate.command(epilog="Example: snoopi-rt eval clip --images images --prompts prompts.txt --network b32")
@subjects
@click.option("--network", type=click.Choice(["g14", "b32"]), multiple=True, help="ViT-g-14 (the protocol's) or ViT-B-32.  [default: both]")
def clip(network: tuple[str, ...], **options: Any) -> None:
    """Score how well images match their prompts: CLIP score, and CLIP+ and CLIP- with negative prompts."""
    _measure("clip", tuple(f"clip-{one}" for one in network or ("g14", "b32")), options)


@evaluate.command(epilog="Example: snoopi-rt eval fid --bundle my-bundle --prompts captions.txt --reference coco/val2014")
@subjects
@reference_option
@click.option(
    "--features",
    type=click.Choice(["inception", "dinov2", "cmmd", "lite2"]),
    multiple=True,
    help="inception: FID and KID; dinov2: Frechet distance; cmmd: CMMD on CLIP; lite2: all of these on EfficientNet-Lite2, which needs no "
    "download. Repeatable.  [default: inception]",
)
def fid(features: tuple[str, ...], **options: Any) -> None:
    """Measure the distance to real images: FID and KID, or on other features."""
    _measure("fid", tuple("fid" if name == "inception" else name for name in features or ("inception",)), options)


@evaluate.command(epilog="Example: snoopi-rt eval pr --bundle my-bundle --prompts captions.txt --reference coco/val2014")
@subjects
@reference_option
def pr(**options: Any) -> None:
    """Measure precision, recall, density and coverage against real images."""
    _measure("pr", ("pr",), options)


@evaluate.command("all", epilog="Example: snoopi-rt eval all --bundle my-bundle --prompts prompts.jsonl --reference real")
@subjects
@click.option("--reference", type=folder_path, metavar="FOLDER", help="Folder of real images; without it no FID, precision and recall.")
@click.option("--runs", type=Integer(1), default=20, metavar="N", help="Images to time.")
def every(**options: Any) -> None:
    """Measure HPSv2, CLIP, FID, precision and recall, and the latency and memory of bundles."""
    from snoopi_rt.export.evaluation.measures import COMMANDS

    _measure("all", COMMANDS["all"] if options["reference"] else (*COMMANDS["hps"], *COMMANDS["clip"]), options)


@evaluate.command(epilog="Example: snoopi-rt eval negatives --bundle nasa=a --bundle vsf=b --seeds 8 --tune")
@bundles_option
@click.option("--pairs", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Pairs to use instead of the built-in ones.")
@click.option("--scales", metavar="X,...", help="Negative scales.  [default: a quarter, a half, one and two of the bundle's]")
@click.option("--seeds", type=Integer(1), default=4, metavar="N", help="Seeds per pair.")
@click.option("--limit", type=Integer(1), metavar="N", help="Use at most N pairs, spread evenly.")
@click.option("--labelled", type=folder_path, metavar="FOLDER", help="Labelled images, to measure the classifier's own error.")
@click.option("--tune", is_flag=True, help="Choose each bundle's default scale on half of the prompts, and report the other half.")
@click.option("--network-weights", "weights", multiple=True, metavar="clip-b32=PATH|ID", help="File or hub id of the classifier's weights.")
@click.option("--dry-run", is_flag=True, help="List what would be fetched and drawn, and stop.")
@evaluation_out_option
def negatives(bundles: tuple[str, ...], scales: str | None, dry_run: bool, out: Path, **options: Any) -> None:
    """Measure what negative prompts remove and keep, and what they do to images that do not show the unwanted thing."""
    with torch_command("eval negatives", "eval", out):
        from snoopi_rt.export.evaluation.measures import Subject
        from snoopi_rt.export.evaluation.negatives_run import NegativesPlan, dry_run_negatives, evaluate_negatives
        from snoopi_rt.export.evaluation.weight_files import parse_weights

        options["weights"] = parse_weights(options["weights"])
        named = tuple(Subject(name, "bundle", path) for name, path in map(named_folder, bundles)) or (Subject("embedded", "bundle", None),)
        plan = NegativesPlan(named, out, scales=_numbers(scales), **options)
        if dry_run:
            dry_run_negatives(plan, lambda line: click.echo(visible(line)))
            return
        evaluate_negatives(plan, say)
    click.echo((out / "negatives.md").read_text(encoding="utf-8"), nl=False)
    say(f"look at {quote(out / 'negatives.png')} and the sheets beside it")


def _numbers(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise InputError(f"--scales {text!r} is not a list of numbers, such as 0.5,1") from error


@evaluate.command(epilog="Example: snoopi-rt eval check")
@click.option(
    "--whole", "network", metavar="NAME", help="Instead, measure what a network costs at its true size; NAME is as in --network-weights."
)
def check(network: str | None) -> None:
    """Check every measure against its plain formula, on networks with random weights: fetches nothing, takes a minute."""
    with torch_command("eval check", "eval", Path()):
        from snoopi_rt.export.evaluation.check import check as run
        from snoopi_rt.export.evaluation.check import whole
        from snoopi_rt.export.evaluation.weight_files import WEIGHTS

        if network is not None:
            if network not in WEIGHTS:
                raise InputError(f"unknown network {network!r}, choose from {', '.join(WEIGHTS)}")
            whole(network, lambda line: click.echo(visible(line)))
            return
        run(lambda line: click.echo(visible(line)))
    click.echo("all measures agree with their formulas")


def _measure(command: str, measures: tuple[str, ...], options: dict[str, Any]) -> None:
    out = options.pop("out")
    with torch_command(f"eval {command}", "eval", out):
        from snoopi_rt.export.evaluation.measures import dry_run
        from snoopi_rt.export.evaluation.measures import evaluate as run

        dry = options.pop("dry_run")
        plan = _plan(command, measures, out, options)
        if dry:
            dry_run(plan, lambda line: click.echo(visible(line)))
            return
        run(plan, say)
    click.echo((out / f"{command}.md").read_text(encoding="utf-8"), nl=False)
    say(f"{quote(out / f'{command}.json')} has every figure; look at the images beside it")


def _plan(command: str, measures: tuple[str, ...], out: Path, options: dict[str, Any]) -> "Plan":
    from snoopi_rt.export.evaluation.measures import Plan, Subject
    from snoopi_rt.export.evaluation.weight_files import parse_weights

    named = [Subject(name, "bundle", path) for name, path in map(named_folder, options.pop("bundles"))]
    named += [Subject(name, "pipeline", path) for name, path in map(named_folder, options.pop("pipelines"))]
    named += [Subject(name, "images", path) for name, path in map(named_folder, options.pop("folders"))]
    options["weights"] = parse_weights(options["weights"])
    return Plan(command, measures, tuple(named) or (Subject("embedded", "bundle", None),), out=out, **options)
