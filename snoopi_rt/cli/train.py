"""The commands that make a student: data and train. The PyTorch side is imported inside them."""

from importlib import import_module
from pathlib import Path
from typing import Any

import click

from snoopi_rt.cli.export import building, file, folder, out_option
from snoopi_rt.cli.options import Group, Number, Seed, completed_by
from snoopi_rt.errors import InputError
from snoopi_rt.shell import quote

RECIPES = "snoopi_rt.export.training.recipes"
data_option = click.option("--data", type=folder, required=True, metavar="FOLDER", help="What `data emoji` wrote.")
compile_option = click.option("--compile", "compiled", is_flag=True, help="Use torch.compile: faster, needs a C++ compiler.")


@click.group(cls=Group, epilog="Example: snoopi-rt data emoji --encoder weights/small/teacher/vae --out runs/emoji")
def data() -> None:
    """Make the captioned pictures that the small model learns from."""


@data.command(epilog="Example: snoopi-rt data emoji --encoder weights/small/teacher/vae --out runs/emoji")
@click.option("--encoder", type=folder, required=True, metavar="FOLDER", help="The autoencoder through which the networks see pictures.")
@out_option
@click.option("--count", type=int, default=49_152, show_default=True, metavar="N", help="How many pictures; a set that is there grows.")
@click.option("--seed", type=Seed(), default=0, metavar="N", help="The same seed gives the same pictures.")
def emoji(encoder: Path, out: Path, count: int, seed: int) -> None:
    """Fetch emoji drawings with npm and compose captioned pictures of them, as latents."""
    with building("data emoji", "train", out):
        from snoopi_rt.export.small_model.dataset.build import build

        build(out, encoder, count, seed)
    click.echo(f"{count} pictures in {quote(out)}; look at {quote(out / 'image_grid.png')}")


@click.group(cls=Group, epilog="Example: snoopi-rt train student --teacher runs/teacher --prompts prompts.txt --out runs/student")
def train() -> None:
    """Train a one-step student of any teacher, or the small model from pictures: decoder, then teacher, then student.

    A run that was stopped goes on where it was.
    """


backbone_option = click.option(
    "--backbone",
    default="small",
    metavar="NAME",
    shell_complete=completed_by(lambda: import_module(RECIPES).DEFAULT),
    help="small, pixart, sd15 or sd21.",
)
# A recipe has dozens of settings, and each stage its own: so one option for all of them.
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting of the recipe: steps=1000, lora.rank=32. An unknown name lists all.",
)


@train.command(epilog="Example: snoopi-rt train decoder --data runs/emoji --encoder weights/small/teacher/vae --out runs/decoder --compile")
@data_option
@click.option("--encoder", type=folder, required=True, metavar="FOLDER", help="The autoencoder of the set, whose decoder is begun with.")
@out_option
@set_option
@compile_option
def decoder(data: Path, encoder: Path, out: Path, settings: tuple[str, ...], compiled: bool) -> None:
    """Train the decoder that turns latents into pictures."""
    with building("train decoder", "train", out):
        from snoopi_rt.export.small_model import decoder as stage

        stage.train(data, encoder, out, _recipe(stage.DecoderRecipe(), settings), compiled)


@train.command(epilog="Example: snoopi-rt train teacher --data runs/emoji --decoder runs/decoder --out runs/teacher --compile")
@data_option
@click.option("--decoder", type=folder, required=True, metavar="FOLDER", help="What `train decoder` wrote.")
@click.option("--start", type=folder, metavar="FOLDER", help="A teacher to train on.  [default: a new network]")
@out_option
@set_option
@compile_option
def teacher(data: Path, decoder: Path, start: Path | None, out: Path, settings: tuple[str, ...], compiled: bool) -> None:
    """Train the multi-step teacher."""
    with building("train teacher", "train", out):
        from snoopi_rt.export.small_model import teacher as stage

        stage.train(data, decoder, out, _recipe(stage.TeacherRecipe(), settings), compiled, start)


@train.command(
    epilog="Example: snoopi-rt train student --teacher runs/teacher --prompts runs/emoji/prompts.txt --out runs/student --compile"
)
@backbone_option
@click.option(
    "--teacher", type=folder, required=True, metavar="FOLDER", help="A diffusers folder; of the small model: what `train teacher` wrote."
)
@click.option(
    "--prompts",
    type=file,
    required=True,
    metavar="FILE",
    help="Prompts: .txt, .csv, .tsv, .json, .jsonl or .parquet. No picture is needed.",
)
@out_option
@click.option(
    "--recipe",
    metavar="NAME",
    shell_complete=completed_by(lambda: import_module(RECIPES).RECIPES),
    help="Where the settings come from, see `train recipes`.  [default: the backbone's]",
)
@set_option
@click.option("--student", "start", type=folder, metavar="FOLDER", help="Where the student starts from.  [default: the teacher's weights]")
@click.option("--negatives", type=file, metavar="FILE", help="Negative prompts to train with (NASA-T), and --set nasa_max=1.")
@click.option("--edits", type=file, metavar="FILE", help="What negatives should do (.jsonl), and --set edits.weight=1 --set nasa_max=1.")
@click.option("--clip", type=folder, metavar="FOLDER", help="A CLIP model for the clamped CLIP loss, and --set clip.weight=0.1.")
@click.option("--states", type=folder, metavar="FOLDER", help="Where the text states are kept, for several runs.  [default: in --out]")
@compile_option
def student(
    backbone: str,
    teacher: Path,
    prompts: Path,
    out: Path,
    recipe: str | None,
    settings: tuple[str, ...],
    start: Path | None,
    negatives: Path | None,
    edits: Path | None,
    clip: Path | None,
    states: Path | None,
    compiled: bool,
) -> None:
    """Distil a teacher into a one-step student by PG-SB.

    On several GPUs or hosts: `accelerate launch -m snoopi_rt train student ...`. A run that was stopped goes on where it was.
    """
    with building("train student", "train", out):
        from snoopi_rt.export.training.recipes import DEFAULT, find_recipe
        from snoopi_rt.export.training.task import Task
        from snoopi_rt.export.training.trainer import train as distil

        if backbone not in DEFAULT:
            raise InputError(f"backbone {backbone!r} cannot be trained here, choose from {', '.join(DEFAULT)}")
        chosen = _recipe(find_recipe(recipe or DEFAULT[backbone]), settings)
        task = Task(backbone, teacher, prompts, out, start, negatives, edits, clip, states)
        preset = distil(task, chosen, compiled, say=lambda text: click.echo(text, err=True))
    click.echo(f"the student is in {quote(out)}: snoopi-rt export --preset {preset} --weights {quote(out)} --out BUNDLE")


@train.command(epilog="Example: snoopi-rt train recipes")
def recipes() -> None:
    """Show every recipe of `train student` in full."""
    from snoopi_rt.export.training.recipes import table

    click.echo(table())


@click.command(epilog="Example: snoopi-rt merge runs/a runs/b --weight 0.5 --backbone sd21 --out runs/merged")
@click.argument("first", type=folder)
@click.argument("second", type=folder)
@backbone_option
@click.option("--weight", type=Number(0, 1), default=0.5, metavar="W", help="Of the first.")
@out_option
def merge(first: Path, second: Path, backbone: str, weight: float, out: Path) -> None:
    """Average the weights of two students of one teacher (SwiftBrush v2)."""
    with building("merge", "train", out):
        from snoopi_rt.export.training.merge import merge as write

        write(backbone, first, second, weight, out)
    click.echo(f"the student is in {quote(out)}; it is exported as {quote(first)} was")


def _recipe(recipe: Any, settings: tuple[str, ...]) -> Any:
    """The recipe with its settings changed by KEY=VALUE texts. Raises InputError for an unknown name or a value of another type."""
    from snoopi_rt.export.settings import changed, parsed
    from snoopi_rt.export.training.recipe import StudentRecipe
    from snoopi_rt.export.training.recipes import FORMER_NAMES

    former = FORMER_NAMES if isinstance(recipe, StudentRecipe) else None
    return changed(recipe, parsed(recipe, settings, former=former))
