"""`snoopi-rt train`. The PyTorch side is imported inside its commands."""

from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from snoopi_rt.cli.options import RECIPES, Group, backbone_option, completed_by, file_path, folder_path, out_option
from snoopi_rt.cli.torch_command import torch_command
from snoopi_rt.errors import InputError
from snoopi_rt.shell import quote

data_option = click.option("--data", type=folder_path, required=True, metavar="FOLDER", help="Data set that `data emoji` wrote.")
compile_option = click.option("--compile", "compiled", is_flag=True, help="Use torch.compile: faster, needs a C++ compiler.")


@click.group(cls=Group, epilog="Example: snoopi-rt train student --teacher runs/teacher --prompts prompts.txt --out runs/student")
def train() -> None:
    """Train a one-step student of any teacher, or every part of a small model like the embedded one.

    A run that was stopped resumes.
    """


# A recipe has dozens of settings, and each stage its own: so one option for all of them.
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a setting of the recipe, such as steps=1000; an unknown name lists all. Repeatable.",
)


@train.command(epilog="Example: snoopi-rt train decoder --data runs/emoji --encoder weights/small/encoder --out runs/decoder --compile")
@data_option
@click.option(
    "--encoder", type=folder_path, required=True, metavar="FOLDER", help="Autoencoder of the data set; training starts from its decoder."
)
@out_option
@set_option
@compile_option
def decoder(data: Path, encoder: Path, out: Path, settings: tuple[str, ...], compiled: bool) -> None:
    """Train the decoder that turns latents into images."""
    with torch_command("train decoder", "train", out):
        from snoopi_rt.export.small_model import decoder as stage

        stage.train(data, encoder, out, _recipe(stage.DecoderRecipe(), settings, stage.FORMER_NAMES), compiled)
    click.echo(f"the decoder is in {quote(out)}: snoopi-rt train teacher --data {quote(data)} --decoder {quote(out)} --out TEACHER")


@train.command(epilog="Example: snoopi-rt train teacher --data runs/emoji --decoder runs/decoder --out runs/teacher --compile")
@data_option
@click.option("--decoder", type=folder_path, required=True, metavar="FOLDER", help="Decoder that `train decoder` wrote.")
@click.option("--start", type=folder_path, metavar="FOLDER", help="Teacher to start from.  [default: a new network]")
@out_option
@set_option
@compile_option
def teacher(data: Path, decoder: Path, start: Path | None, out: Path, settings: tuple[str, ...], compiled: bool) -> None:
    """Train the multi-step teacher."""
    with torch_command("train teacher", "train", out):
        from snoopi_rt.export.small_model import teacher as stage

        stage.train(data, decoder, out, _recipe(stage.TeacherRecipe(), settings, stage.FORMER_NAMES), compiled, start)
    click.echo(f"the teacher is in {quote(out)}: snoopi-rt train student --teacher {quote(out)} --prompts PROMPTS --out STUDENT")


@train.command(
    epilog="Example: snoopi-rt train student --teacher runs/teacher --prompts runs/emoji/prompts.txt --out runs/student --compile"
)
@backbone_option
@click.option(
    "--teacher",
    type=folder_path,
    required=True,
    metavar="FOLDER",
    help="Diffusers folder; for the small model, the output of `train teacher`.",
)
@click.option(
    "--prompts",
    type=file_path,
    required=True,
    metavar="FILE",
    help="Prompts: .txt, .csv, .tsv, .json, .jsonl or .parquet. No images are needed.",
)
@out_option
@click.option(
    "--recipe",
    metavar="NAME",
    shell_complete=completed_by(lambda: import_module(RECIPES).RECIPES),
    help="Recipe to start from, see `train recipes`.  [default: the backbone's]",
)
@set_option
@click.option("--start", type=folder_path, metavar="FOLDER", help="Student to start from.  [default: the teacher's weights]")
@click.option("--negatives", type=file_path, metavar="FILE", help="Negative prompts to train with; needs --set negative_scale_max=1.")
@click.option(
    "--edits",
    type=file_path,
    metavar="FILE",
    help="Edits that negative prompts should make (.jsonl); needs --set edits.weight=1 --set negative_scale_max=1.",
)
@click.option("--clip", type=folder_path, metavar="FOLDER", help="CLIP model for the clamped CLIP loss; needs --set clip.weight=0.1.")
@click.option(
    "--states",
    type=folder_path,
    metavar="FOLDER",
    help="Folder where several runs share text states and the teacher's images.  [default: in --out]",
)
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

    On several GPUs or hosts: `accelerate launch -m snoopi_rt train student ...`. A run that was stopped resumes.
    """
    from snoopi_rt.export.training.recipes import DEFAULT, check_trainable

    check_trainable(backbone)
    chosen = _student_recipe(recipe or DEFAULT[backbone], settings)
    with torch_command("train student", "train", out):
        from snoopi_rt.export.training.task import Task
        from snoopi_rt.export.training.trainer import train as distil

        task = Task(backbone, teacher, prompts, out, start, negatives, edits, clip, states)
        preset = distil(task, chosen, compiled, say=lambda text: click.echo(text, err=True))
    click.echo(f"the student is in {quote(out)}: snoopi-rt export --preset {preset} --weights {quote(out)} --out BUNDLE")


@train.command(
    epilog="Example: snoopi-rt train student-decoder --student runs/student --teacher runs/teacher --data runs/emoji --out runs/light"
)
@click.option("--student", "student_folder", type=folder_path, required=True, metavar="FOLDER", help="Student that `train student` wrote.")
@click.option("--teacher", "teacher_folder", type=folder_path, required=True, metavar="FOLDER", help="Its teacher.")
@data_option
@click.option("--start", type=folder_path, metavar="FOLDER", help="Decoder to start from.  [default: a new network]")
@out_option
@set_option
@compile_option
def student_decoder(
    student_folder: Path, teacher_folder: Path, data: Path, start: Path | None, out: Path, settings: tuple[str, ...], compiled: bool
) -> None:
    """Train a light decoder that restores what a student's latents lack, for `export --decoder`."""
    with torch_command("train student-decoder", "train", out):
        from snoopi_rt.export.small_model import student_decoder as stage

        recipe = _recipe(stage.StudentDecoderRecipe(), settings)
        stage.train(student_folder, teacher_folder, data, out, recipe, compiled, start)
    export = f"snoopi-rt export --backbone small --weights {quote(student_folder)} --decoder {quote(out)} --out BUNDLE"
    click.echo(f"the decoder is in {quote(out)}: {export}")


@train.command(epilog="Example: snoopi-rt train recipes")
def recipes() -> None:
    """Show every recipe of `train student` in full."""
    from snoopi_rt.export.training.recipes import table

    click.echo(table())


def _student_recipe(name: str, settings: tuple[str, ...]) -> Any:
    """The recipe of that name with its settings changed. Raises InputError."""
    from snoopi_rt.export.training.recipes import find_recipe

    try:
        return _recipe(find_recipe(name), settings)  # before torch is imported, which takes seconds
    except InputError:
        # The settings of a loss may stand in its own file: they are known when that is imported.
        with suppress(ModuleNotFoundError):
            import_module("snoopi_rt.export.training.losses")
        return _recipe(find_recipe(name), settings)


def _recipe(recipe: Any, settings: tuple[str, ...], former: Mapping[str, str] | None = None) -> Any:
    """The recipe with its settings changed by KEY=VALUE texts; `former`: former names of settings, with their present ones.

    Raises InputError for an unknown name or a value of another type.
    """
    from snoopi_rt.export.settings import changed, parsed
    from snoopi_rt.export.training.recipe import StudentRecipe
    from snoopi_rt.export.training.recipes import FORMER_NAMES

    if not isinstance(recipe, StudentRecipe):
        return changed(recipe, parsed(recipe, settings, former=former))
    new_groups = "a loss of your own must be registered first, see CONTRIBUTING.md, Add a loss"
    return changed(recipe, parsed(recipe, settings, former=FORMER_NAMES, new_groups=new_groups))
