"""The commands that make a student: data and train. The PyTorch side is imported inside them."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from snoopi_rt.cli_export import building, folder, out_option
from snoopi_rt.engines.base import InputError

data_option = click.option("--data", type=folder, required=True, metavar="FOLDER", help="What `data emoji` wrote.")
compile_option = click.option("--compile", "compiled", is_flag=True, help="Use torch.compile: faster, needs a C++ compiler.")


@click.group(epilog="Example: snoopi-rt data emoji --out runs/emoji")
def data() -> None:
    """Make the captioned pictures that the small model learns from."""


@data.command(epilog="Example: snoopi-rt data emoji --out runs/emoji")
@out_option
@click.option("--count", type=int, default=30_000, metavar="N", help="How many pictures.")
@click.option("--seed", type=int, default=0, metavar="N", help="The same seed gives the same pictures.")
def emoji(out: Path, count: int, seed: int) -> None:
    """Fetch emoji drawings with npm and draw captioned pictures from them."""
    with building("data emoji", "train", out):
        from snoopi_rt.export.training.emoji import build

        build(out, count, seed)
    click.echo(f"{count} pictures in {out}; look at {out / 'contact_sheet.png'}")


@click.group(epilog="Example: snoopi-rt train autoencoder --data runs/emoji --out runs/autoencoder")
def train() -> None:
    """Train the small model: autoencoder, then teacher, then student. A run that was stopped goes on where it was."""


# The settings and their defaults live in the recipes, which need torch: so one option for all of them.
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting of the recipe, such as steps=1000; an unknown one lists all.",
)


@train.command(epilog="Example: snoopi-rt train autoencoder --data runs/emoji --out runs/autoencoder --compile")
@data_option
@out_option
@set_option
@compile_option
def autoencoder(data: Path, out: Path, settings: tuple[str, ...], compiled: bool) -> None:
    """Train the autoencoder that turns pictures into latents and back."""
    with building("train autoencoder", "train", out):
        from snoopi_rt.export.training import autoencoder as stage

        stage.train(data, out, _recipe(stage.Recipe, settings), compiled)


@train.command(epilog="Example: snoopi-rt train teacher --data runs/emoji --autoencoder runs/autoencoder --out runs/teacher --compile")
@data_option
@click.option("--autoencoder", type=folder, required=True, metavar="FOLDER", help="What `train autoencoder` wrote.")
@out_option
@set_option
@compile_option
def teacher(data: Path, autoencoder: Path, out: Path, settings: tuple[str, ...], compiled: bool) -> None:
    """Train the multi-step teacher."""
    with building("train teacher", "train", out):
        from snoopi_rt.export.training import teacher as stage

        stage.train(data, autoencoder, out, _recipe(stage.Recipe, settings), compiled)


@train.command(epilog="Example: snoopi-rt train student --data runs/emoji --teacher runs/teacher --out runs/student --compile")
@data_option
@click.option("--teacher", type=folder, required=True, metavar="FOLDER", help="What `train teacher` wrote.")
@out_option
@set_option
@compile_option
def student(data: Path, teacher: Path, out: Path, settings: tuple[str, ...], compiled: bool) -> None:
    """Distil the teacher into a one-step student by PG-SB. Only the captions of --data are read."""
    with building("train student", "train", out):
        from snoopi_rt.export.training import student as stage

        stage.train(data, teacher, out, _recipe(stage.Recipe, settings), compiled)


def _recipe(kind: type, settings: tuple[str, ...]) -> Any:
    """The stage's recipe with the given settings. Raises InputError for an unknown name or a value of another type."""
    types: dict[str, type] = {field.name: type(field.default) for field in fields(kind)}
    given = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in types:
            raise InputError(f"unknown setting {key!r}, choose from {', '.join(types)}")
        try:
            given[key] = types[key](value)
        except ValueError:
            raise InputError(f"setting {key} is {value!r}, which is not {types[key].__name__}") from None
    return kind(**given)
