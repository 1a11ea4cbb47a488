"""`snoopi-rt data`. The PyTorch side is imported inside its commands."""

from pathlib import Path

import click

from snoopi_rt.cli.options import Group, Seed, folder_path, out_option
from snoopi_rt.cli.torch_command import torch_command
from snoopi_rt.shell import quote


@click.group(cls=Group, epilog="Example: snoopi-rt data emoji --encoder weights/small/encoder --out runs/emoji")
def data() -> None:
    """Make captioned training images for a small model like the embedded one."""


@data.command(epilog="Example: snoopi-rt data emoji --encoder weights/small/encoder --out runs/emoji")
@click.option("--encoder", type=folder_path, required=True, metavar="FOLDER", help="Autoencoder that turns the images into latents.")
@out_option
@click.option(
    "--count", type=int, default=98_304, show_default=True, metavar="N", help="Number of images; an existing data set grows to it."
)
@click.option("--seed", type=Seed(), default=0, metavar="N", help="The same seed gives the same images.")
def emoji(encoder: Path, out: Path, count: int, seed: int) -> None:
    """Compose captioned images of emoji drawings, stored as latents."""
    with torch_command("data emoji", "train", out):
        from snoopi_rt.export.small_model.dataset.build import build

        build(out, encoder, count, seed)
    click.echo(f"{count} images in {quote(out)}; see {quote(out / 'image_grid.png')}")
