"""The command that judges a student: eval. The PyTorch side is imported inside it."""

import json
from pathlib import Path

import click

from snoopi_rt.cli_export import building, folder, out_option
from snoopi_rt.cli_options import complete_bundle
from snoopi_rt.engines.base import InputError
from snoopi_rt.shell import quote, visible


@click.command(
    "eval", epilog="Example: snoopi-rt eval --teacher weights/small/teacher --scorers weights/small/scorers --out out/evaluation"
)
@click.option("--domain", default="small", metavar="NAME", help="What is drawn; only small, the emoji-like things.")
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    metavar="[NAME=]FOLDER",
    shell_complete=complete_bundle,
    help="One or more; the first in full.  [default: the embedded]",
)
@click.option("--teacher", type=folder, required=True, metavar="FOLDER", help="Judged alike, at 25 steps and its best guidance.")
@click.option(
    "--scorers",
    type=folder,
    metavar="FOLDER",
    help="Where trained scorers are kept, such as weights/small/scorers, trained first where they are not there.  [default: in --out]",
)
@click.option("--quick", is_flag=True, help="A few pictures of each kind: to see that it runs. Trains scorers, if need be, in --out alone.")
@out_option
def evaluate(domain: str, bundles: tuple[str, ...], teacher: Path, scorers: Path | None, quick: bool, out: Path) -> None:
    """Measure things, backgrounds, flaws and negative prompts; write evaluation.json and pictures."""
    if domain != "small":
        raise InputError(f"unknown domain {domain!r}, choose from small")
    named: dict[str, Path | None] = {name or Path(path).name: Path(path) for name, _, path in (_split(each) for each in bundles)}
    if len(named) < len(bundles):
        raise InputError("two bundles have one name: --bundle NAME=FOLDER gives them others")
    with building("eval", "train", out):
        from snoopi_rt.export.training.small.report import TINY, Extent
        from snoopi_rt.export.training.small.report import evaluate as measure

        extent = TINY if quick else Extent()
        document = measure(
            named or {"embedded": None}, teacher, scorers or out / "scorers", out, extent, lambda line: click.echo(visible(line), err=True)
        )
    click.echo(json.dumps(document))
    click.echo(f"look at {quote(out / 'evaluation.png')}, samples.png and negative_scale.png", err=True)


def _split(text: str) -> tuple[str, str, str]:
    name, equals, path = text.partition("=")
    return (name, equals, path) if equals else ("", "", text)
