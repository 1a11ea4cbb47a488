"""`snoopi-rt merge`. The PyTorch side is imported inside it."""

from pathlib import Path

import click

from snoopi_rt.cli.options import Number, backbone_option, folder_path, out_option
from snoopi_rt.cli.torch_command import torch_command
from snoopi_rt.shell import quote


@click.command(epilog="Example: snoopi-rt merge runs/a runs/b --weight 0.5 --backbone sd21 --out runs/merged")
@click.argument("first", type=folder_path)
@click.argument("second", type=folder_path)
@backbone_option
@click.option("--weight", type=Number(0, 1), default=0.5, metavar="W", help="Weight of FIRST.")
@out_option
def merge(first: Path, second: Path, backbone: str, weight: float, out: Path) -> None:
    """Average the weights of two students of one teacher (SwiftBrush v2)."""
    with torch_command("merge", "train", out):
        from snoopi_rt.export.training.merge import merge as write

        write(backbone, first, second, weight, out)
    click.echo(f"the student is in {quote(out)}; export it as you would {quote(first)}")
