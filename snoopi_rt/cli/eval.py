"""The commands that judge students: eval. Each measure is a command here and a file in export/evaluation, imported inside it."""

from pathlib import Path

import click

from snoopi_rt.cli.export import building, folder
from snoopi_rt.cli.options import Group, complete_bundle, named_folder
from snoopi_rt.errors import InputError
from snoopi_rt.shell import quote, visible

out_option = click.option(
    "--out", type=folder, default=Path("evaluation"), metavar="FOLDER", help="Where to write.  [default: evaluation]", show_default=False
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
    "--teacher", type=folder, metavar="FOLDER", help="Drawn in 25 steps and measured alike; distances are compared with the teacher's."
)
@click.option("--decoder", type=folder, metavar="FOLDER", help="Of the teacher's latents.  [default: its own vae]")
@click.option("--drawings", type=folder, metavar="FOLDER", help="Where the emoji drawings are kept.  [default: npm in --out]")
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
    with building("eval small", "train", out):
        from snoopi_rt.export.evaluation.report import unmet
        from snoopi_rt.export.evaluation.small import QUICK, Extent
        from snoopi_rt.export.evaluation.small import evaluate as measure

        extent = QUICK if quick else Extent()
        columns = measure(named, teacher, decoder, drawings or out / "npm", out, extent, lambda line: click.echo(visible(line), err=True))
    for name in named:
        rows = [row for row in columns[name] if row.goal is not None]
        click.echo(visible(f"{name}: {len(rows) - len(unmet(rows))} of {len(rows)} goals met"))
    click.echo(f"read {quote(out / 'small.md')}, and look at small.png, natural.png, things.png and clean.png beside it", err=True)
