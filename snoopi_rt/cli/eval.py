"""The commands that judge students: eval. Each measure is a command here and a file in export/evaluation, imported inside it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from snoopi_rt.cli.options import Group, Integer, Number, complete_bundle, folder_path, named_folder
from snoopi_rt.cli.torch_command import torch_command
from snoopi_rt.errors import InputError
from snoopi_rt.shell import quote, visible

if TYPE_CHECKING:
    from snoopi_rt.export.evaluation.measures import Plan

out_option = click.option(
    "--out",
    type=folder_path,
    default=Path("evaluation"),
    metavar="FOLDER",
    help="Where to write.  [default: evaluation]",
    show_default=False,
)


@click.group("eval", cls=Group, epilog="Example: snoopi-rt eval small --bundle my-bundle")
def evaluate() -> None:
    """Measure what students can do."""


@evaluate.command(epilog="Example: snoopi-rt eval small --teacher weights/small/teacher --out out/evaluation")
@click.option(
    "--bundle",
    "students",
    multiple=True,
    metavar="[NAME=]FOLDER",
    shell_complete=complete_bundle,
    help="A bundle, or a student's weights; several stand beside each other.  [default: the embedded bundle]",
)
@click.option(
    "--teacher", type=folder_path, metavar="FOLDER", help="Drawn in 25 steps and measured alike; distances are compared with the teacher's."
)
@click.option("--decoder", type=folder_path, metavar="FOLDER", help="Of the teacher's latents.  [default: its own vae]")
@click.option("--drawings", type=folder_path, metavar="FOLDER", help="Where the emoji drawings are kept.  [default: npm in --out]")
@click.option("--quick", is_flag=True, help="A few pictures of each kind: to see that it runs.")
@out_option
def small(students: tuple[str, ...], teacher: Path | None, decoder: Path | None, drawings: Path | None, quick: bool, out: Path) -> None:
    """Judge the embedded model and others of its kind.

    Writes small.json, small.md, a plot, and sheets of uncurated pictures.
    """
    named: dict[str, Path | None] = dict(map(named_folder, students)) or {"embedded": None}
    if len(named) < len(students) or "teacher" in named:
        raise InputError("each bundle needs a name of its own: --bundle NAME=FOLDER gives it one")
    if decoder is not None and teacher is None:
        raise InputError("--decoder goes with --teacher")
    with torch_command("eval small", "train", out):
        from snoopi_rt.export.evaluation.report import unmet
        from snoopi_rt.export.evaluation.small import QUICK, Extent
        from snoopi_rt.export.evaluation.small import evaluate as measure

        extent = QUICK if quick else Extent()
        columns = measure(named, teacher, decoder, drawings or out / "npm", out, extent, lambda line: click.echo(visible(line), err=True))
    for name in named:
        rows = [row for row in columns[name] if row.goal is not None]
        click.echo(visible(f"{name}: {len(rows) - len(unmet(rows))} of {len(rows)} goals met"))
    click.echo(f"read {quote(out / 'small.md')}, and look at small.png, natural.png, things.png and clean.png beside it", err=True)


def _say(line: str) -> None:
    click.echo(visible(line), err=True)


def subjects(command: Callable[..., Any]) -> Callable[..., Any]:
    """Who is measured, on what, with which weights: the options that all measures of image sets share."""
    options = (
        click.option(
            "--bundle",
            "bundles",
            multiple=True,
            metavar="[NAME=]FOLDER",
            shell_complete=complete_bundle,
            help="A bundle, or a student's weights; several stand beside each other.  [default: the embedded bundle]",
        ),
        click.option("--pipeline", "pipelines", multiple=True, metavar="[NAME=]FOLDER", help="A diffusers pipeline, through torch."),
        click.option("--images", "folders", multiple=True, metavar="[NAME=]FOLDER", help="Images that another program made."),
        click.option(
            "--prompts",
            type=click.Path(path_type=Path),
            required=True,
            metavar="FILE",
            help="Their prompts; columns style, negative_prompt, seed and file are read. A folder: a style per file.",
        ),
        click.option(
            "--weights", "weights", multiple=True, metavar="NAME=PATH|ID", help="Where a network's weights are; --dry-run lists them."
        ),
        click.option("--limit", type=Integer(1), metavar="N", help="At most so many prompts, evenly; the measure's name says so."),
        click.option("--seed", type=Integer(0), default=0, metavar="N", help="Of the first image; the others follow.  [default: 0]"),
        click.option("--neg-scale", "scale", type=Number(0), metavar="X", help="Strength of negative prompts.  [default: the bundle's]"),
        click.option("--steps", type=Integer(1), metavar="N", help="Of a pipeline.  [default: its own]"),
        click.option("--guidance", type=Number(0), metavar="X", help="Guidance scale of a --pipeline.  [default: its own]"),
        click.option("--dry-run", is_flag=True, help="Say what would be fetched, made and computed, and stop."),
        out_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


reference_option = click.option("--reference", type=folder_path, metavar="FOLDER", help="Real images.")


@evaluate.command(epilog="Example: snoopi-rt eval hps --bundle my-bundle --prompts HPDv2/benchmark --version 2.1")
@subjects
@click.option(
    "--version", type=click.Choice(["2.0", "2.1"]), multiple=True, help="Of HPSv2; their scores cannot be compared.  [default: both]"
)
def hps(version: tuple[str, ...], **options: Any) -> None:
    """HPSv2, per style and average."""
    _measure("hps", tuple(f"hps-v{one}" for one in version or ("2.0", "2.1")), options)


@evaluate.command(epilog="Example: snoopi-rt eval clip --images pictures --prompts prompts.txt --network b32")
@subjects
@click.option("--network", type=click.Choice(["g14", "b32"]), multiple=True, help="ViT-g-14, the protocol's, or ViT-B-32.  [default: both]")
def clip(network: tuple[str, ...], **options: Any) -> None:
    """CLIP score; CLIP+ and CLIP- where there are negative prompts."""
    _measure("clip", tuple(f"clip-{one}" for one in network or ("g14", "b32")), options)


@evaluate.command(epilog="Example: snoopi-rt eval fid --bundle my-bundle --prompts captions.txt --reference coco/val2014")
@subjects
@reference_option
@click.option(
    "--features",
    type=click.Choice(["inception", "dinov2", "cmmd", "lite2"]),
    multiple=True,
    help="FID and KID; the Frechet distance in DINOv2's; CMMD; all of these in Lite2's, with nothing to fetch.  [default: inception]",
)
def fid(features: tuple[str, ...], **options: Any) -> None:
    """FID and KID, or distances in other features, to real images."""
    _measure("fid", tuple("fid" if name == "inception" else name for name in features or ("inception",)), options)


@evaluate.command(epilog="Example: snoopi-rt eval pr --bundle my-bundle --prompts captions.txt --reference coco/val2014")
@subjects
@reference_option
def pr(**options: Any) -> None:
    """Precision, recall, density and coverage against real images."""
    _measure("pr", ("pr",), options)


@evaluate.command("all", epilog="Example: snoopi-rt eval all --bundle my-bundle --prompts prompts.jsonl --reference real")
@subjects
@reference_option
@click.option("--runs", type=Integer(1), default=20, metavar="N", help="Images that are timed.  [default: 20]")
def every(**options: Any) -> None:
    """HPSv2, CLIP, FID, precision and recall; latency and memory beside them."""
    from snoopi_rt.export.evaluation.measures import COMMANDS

    _measure("all", COMMANDS["all"] if options["reference"] else (*COMMANDS["hps"], *COMMANDS["clip"]), options)


@evaluate.command(epilog="Example: snoopi-rt eval negatives --bundle nasa=a --bundle vsf=b --seeds 8 --tune")
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    metavar="[NAME=]FOLDER",
    shell_complete=complete_bundle,
    help="A bundle, or a student's weights; several stand on the same axes.  [default: the embedded bundle]",
)
@click.option("--pairs", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Other pairs than those that ship.")
@click.option("--scales", metavar="X,...", help="Negative scales.  [default: a quarter, a half, one and two of the bundle's]")
@click.option("--seeds", type=Integer(1), default=4, metavar="N", help="Of each pair.  [default: 4]")
@click.option("--limit", type=Integer(1), metavar="N", help="At most so many pairs, evenly.")
@click.option("--labelled", type=folder_path, metavar="FOLDER", help="Labelled pictures, for the classifier's own error.")
@click.option("--tune", is_flag=True, help="Choose each bundle's default scale on half of the prompts, report the other half.")
@click.option("--weights", "weights", multiple=True, metavar="clip-b32=PATH|ID", help="Where the classifier's weights are.")
@click.option("--dry-run", is_flag=True, help="Say what would be fetched and made, and stop.")
@out_option
def negatives(bundles: tuple[str, ...], scales: str | None, dry_run: bool, out: Path, **options: Any) -> None:
    """What negative prompts remove, keep, and do to pictures that do not show it."""
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
        evaluate_negatives(plan, _say)
    click.echo((out / "negatives.md").read_text(encoding="utf-8"), nl=False)
    _say(f"look at {quote(out / 'negatives.png')} and the sheets beside it")


def _numbers(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise InputError(f"--scales {text!r} is not a list of numbers, such as 0.5,1") from error


@evaluate.command(epilog="Example: snoopi-rt eval check")
@click.option("--whole", "network", metavar="NAME", help="Instead: what the network of those weights costs at its true size.")
def check(network: str | None) -> None:
    """Run every measure with random weights against plain formulas: needs no weights, takes a minute."""
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
        run(plan, _say)
    click.echo((out / f"{command}.md").read_text(encoding="utf-8"), nl=False)
    _say(f"{quote(out / f'{command}.json')} has every figure; look at the images beside it")


def _plan(command: str, measures: tuple[str, ...], out: Path, options: dict[str, Any]) -> "Plan":
    from snoopi_rt.export.evaluation.measures import Plan, Subject
    from snoopi_rt.export.evaluation.weight_files import parse_weights

    named = [Subject(name, "bundle", path) for name, path in map(named_folder, options.pop("bundles"))]
    named += [Subject(name, "pipeline", path) for name, path in map(named_folder, options.pop("pipelines"))]
    named += [Subject(name, "images", path) for name, path in map(named_folder, options.pop("folders"))]
    options["weights"] = parse_weights(options["weights"])
    return Plan(command, measures, tuple(named) or (Subject("embedded", "bundle", None),), out=out, **options)
