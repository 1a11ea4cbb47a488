"""`snoopi-rt export`. The PyTorch side is imported inside it."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from snoopi_rt.cli.options import Number, completed_by, folder_path, prompt_file_options, say
from snoopi_rt.cli.torch_command import torch_command
from snoopi_rt.errors import InputError
from snoopi_rt.shell import quote, size_text, visible

if TYPE_CHECKING:
    from snoopi_rt.export.weights.hub import ModelFile

ROWS = "snoopi_rt.export.presets.rows"


@click.command(epilog="Example: snoopi-rt export --backbone pixart --decoder tiny")
@click.option(
    "--backbone",
    metavar="NAME",
    shell_complete=completed_by(lambda: import_module(ROWS).DEFAULT_PRESET),
    help="small, pixart, sd15, sd21, sdxl or sana.  [default: the preset's]",
)
@click.option(
    "--preset",
    metavar="NAME",
    shell_complete=completed_by(lambda: import_module(ROWS).PRESETS),
    help="Timestep and one-step rule of a public student, see `presets`.  [default: the backbone's, adjusted to --weights]",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a value of the preset, such as timestep=400; an unknown key lists all. Repeatable.",
)
@click.option("--weights", metavar="FOLDER|ID", help="Diffusers folder or hub id, owner/name[@revision].  [default: the preset's]")
@click.option("--weights-file", type=click.Path(path_type=Path), metavar="FILE", help="Separate weights for the transformer or UNet.")
@click.option(
    "--lora", "loras", multiple=True, metavar="FILE[:W]", help="LoRA to merge, text encoders included; repeatable.  [default weight: 1]"
)
@click.option("--out", type=folder_path, metavar="FOLDER", help="Output folder.  [default: the preset's name, in the current folder]")
@click.option(
    "--guidance",
    metavar="KIND",
    shell_complete=completed_by(lambda: import_module("snoopi_rt.export.guidance").GUIDANCE),
    help="How negative prompts work: nasa, nag, vsf, projected or none.  [default: the preset's]",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    metavar="[GRAPH=]NAME",
    help="auto, fp32, fp16, bf16, int8, int8-weights or int4-weights. Without GRAPH: of every graph, or the nearest it supports. "
    "Repeatable: one variant each.  [default: the backbone's]",
)
@click.option(
    "--tolerance",
    type=Number(0),
    metavar="X",
    help="Largest RMS error of a variant in the clean latent.  [default: 0.05; 0.25 for a generator with --precision int8]",
)
@click.option("--decoder", default="full", metavar="full|tiny|ID", help="full: the VAE's own; tiny: TAESD; or a folder or hub id.")
@click.option("--size", "sizes", metavar="WxH[,WxH...]", help="Supported sizes, the default first.  [default: the preset's]")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prompts whose text states are stored in the bundle; formats as for generate --prompts.",
)
@prompt_file_options
@click.option("--prompts-only", is_flag=True, help="Leave out the text encoder: the bundle can draw the --prompts and no others.")
@click.option("--accept-licence", is_flag=True, help="Accept a licence that forbids commercial use.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--dry-run", is_flag=True, help="Only list the files that would be read, with their sizes; fetch and write nothing.")
def export(
    backbone: str | None,
    preset: str | None,
    settings: tuple[str, ...],
    weights: str | None,
    weights_file: Path | None,
    loras: tuple[str, ...],
    out: Path | None,
    guidance: str | None,
    precisions: tuple[str, ...],
    tolerance: float | None,
    decoder: str,
    sizes: str | None,
    prompts: Path | None,
    prompts_format: str | None,
    ignore_columns: bool,
    prompts_only: bool,
    accept_licence: bool,
    force: bool,
    dry_run: bool,
) -> None:
    """Turn a student's weights into a bundle, checked against PyTorch."""
    from snoopi_rt.export.presets.choose import choose_preset
    from snoopi_rt.export.presets.preset import override

    if dry_run:
        with torch_command("export", "export", Path()):
            from snoopi_rt.export.source import list_files

            _list(list_files(backbone, weights, preset, weights_file, decoder))
        return
    listed = choose_preset(backbone, preset)
    override(listed, settings)  # refuses unknown ones before torch is imported, which takes seconds
    out = out or Path(listed.name)
    with torch_command("export", "export", out):
        from snoopi_rt.export.exporter import check_out
        from snoopi_rt.export.exporter import export as write
        from snoopi_rt.export.options import ExportOptions
        from snoopi_rt.export.source import find_source

        options = ExportOptions(
            guidance,
            _precisions(precisions),
            _sizes(sizes),
            tolerance,
            _prompts(prompts, prompts_format, ignore_columns),
            prompts_only,
            force,
            or_nearest=frozenset(name for name in precisions if "=" not in name),
        )
        check_out(out, force)  # before anything is fetched
        source = find_source(backbone, weights, preset, settings, weights_file, loras, decoder, accept_licence, say)
        bundle = write(source, out, options, say)
    click.echo(bundle.described(graphs=False))  # each variant was printed when it was measured
    say(f"next: snoopi-rt generate --bundle {quote(out)}")


def _list(models: Mapping[str, Sequence["ModelFile"]]) -> None:
    """Prints the files of each model with their sizes."""
    for name, files in models.items():
        click.echo(visible(name))
        for file in files:
            click.echo(f"{size_text(file.size):>10}  {visible(file.name)}{', here' * file.here}")
    every = [file for files in models.values() for file in files]
    absent = sum(file.size for file in every if not file.here)
    click.echo(f"{size_text(sum(file.size for file in every)):>10}  in all, {size_text(absent)} to fetch")


def _precisions(texts: tuple[str, ...]) -> dict[str, list[str]]:
    """The precisions of each graph, in the order of the command line."""
    from snoopi_rt.runtime.precision import parse_precision

    precisions: dict[str, list[str]] = {}
    for text in texts:
        for graph, name in parse_precision(text).items():
            precisions.setdefault(graph, []).append(name)
    return precisions


def _sizes(text: str | None) -> tuple[tuple[int, int], ...]:
    """(height, width) of each size in `text`, in which the width comes first."""
    from snoopi_rt.request import parse_size

    return tuple(dict.fromkeys(parse_size(size.strip()) for size in text.split(","))) if text else ()


def _prompts(path: Path | None, prompts_format: str | None, ignore_columns: bool) -> tuple[str, ...]:
    """The prompts and negative prompts in a file. Raises InputError for an invalid row."""
    from snoopi_rt.batch.prompt_file import PromptFile, texts_of

    if path is None:
        if prompts_format is not None or ignore_columns:
            raise InputError("--prompts-format and --ignore-columns go with --prompts FILE")
        return ()
    texts: list[str] = []
    with PromptFile(path, prompts_format, ignore_columns) as prompt_file:
        for _, place, row in prompt_file.rows():
            try:
                texts += texts_of(row)
            except InputError as error:
                raise InputError(f"{path} {place}: {error}") from error
    return tuple(texts)
