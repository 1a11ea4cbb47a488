"""The commands that make a bundle of a student: export and presets. The PyTorch side is imported inside them."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import click

from snoopi_rt.cli.options import Number, completed_by, prompt_file_options
from snoopi_rt.errors import EngineMissing, InputError, OutputError, SnoopiError, how_to_install
from snoopi_rt.files import check_place, hidden, reason
from snoopi_rt.shell import quote, visible

ROWS = "snoopi_rt.export.presets.rows"
folder = click.Path(file_okay=False, path_type=Path)
file = click.Path(dir_okay=False, path_type=Path)
out_option = click.option("--out", type=folder, required=True, metavar="FOLDER", help="Where to write.")


@click.command(epilog="Example: snoopi-rt presets")
def presets() -> None:
    """List the public students that are known by name; * is what a backbone stands for."""
    from snoopi_rt.export.presets.rows import table

    click.echo(table())


@click.command(epilog="Example: snoopi-rt export --backbone pixart --decoder tiny")
@click.option(
    "--backbone",
    metavar="NAME",
    shell_complete=completed_by(lambda: import_module(ROWS).DEFAULT_PRESET),
    help="small, pixart, sd15, sd21 or sdxl.  [default: the preset's]",
)
@click.option(
    "--preset",
    metavar="NAME",
    shell_complete=completed_by(lambda: import_module(ROWS).PRESETS),
    help="How a public student is called and read, see `presets`.  [default: the backbone's, as the scheduler of --weights corrects it]",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change the preset: timestep=400. An unknown key lists all.")
@click.option("--weights", metavar="FOLDER|ID", help="A diffusers folder or hub id, owner/name[@revision].  [default: the preset's]")
@click.option("--weights-file", type=click.Path(path_type=Path), metavar="FILE", help="The transformer's or UNet's own weights.")
@click.option("--lora", "loras", multiple=True, metavar="FILE[:W]", help="A LoRA to merge, text encoders included.  [default weight: 1]")
@click.option("--out", type=folder, metavar="FOLDER", help="Where to write.  [default: the preset's name, in the current folder]")
@click.option(
    "--guidance",
    default="nasa",
    metavar="KIND",
    shell_complete=completed_by(lambda: import_module("snoopi_rt.export.guidance").GUIDANCE),
    help="How a negative prompt acts: nasa, nag, vsf, projected or none.",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    metavar="[GRAPH=]NAME",
    help="auto, fp32, fp16, bf16, int8, int8-weights or int4-weights. Without GRAPH: that of every graph, or the nearest that it can "
    "have. Several make several variants.  [default: the backbone's]",
)
@click.option(
    "--tolerance",
    type=Number(0),
    metavar="X",
    help="What a variant may change in the clean latent (rms).  [default: 0.05; 0.25 for a generator in int8 by name]",
)
@click.option("--decoder", default="full", metavar="full|tiny|ID", help="The weights' own, TAESD, or a folder or hub id.")
@click.option("--size", "sizes", metavar="WxH[,WxH...]", help="The bundle's sizes, its default first.  [default: the preset's]")
@click.option(
    "--prompts", type=click.Path(path_type=Path), metavar="FILE", help="Prompts whose states the bundle carries, as for generate --prompts."
)
@prompt_file_options
@click.option("--prompts-only", is_flag=True, help="Leave the text encoder out: the bundle knows the --prompts and no others.")
@click.option("--accept-licence", is_flag=True, help="Accept a licence that forbids commercial use.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
def export(
    backbone: str | None,
    preset: str | None,
    settings: tuple[str, ...],
    weights: str | None,
    weights_file: Path | None,
    loras: tuple[str, ...],
    out: Path | None,
    guidance: str,
    precisions: tuple[str, ...],
    tolerance: float | None,
    decoder: str,
    sizes: str | None,
    prompts: Path | None,
    kind: str | None,
    ignore_columns: bool,
    prompts_only: bool,
    accept_licence: bool,
    force: bool,
) -> None:
    """Turn a student's weights into a bundle, checked against PyTorch."""
    from snoopi_rt.export.presets.rows import choose_preset

    out = out or Path(choose_preset(backbone, preset).name)
    with building("export", "export", out):
        from snoopi_rt.export.exporter import ExportOptions, check_out
        from snoopi_rt.export.exporter import export as write
        from snoopi_rt.export.source import find_source

        options = ExportOptions(
            guidance,
            _precisions(precisions),
            _sizes(sizes),
            tolerance,
            _texts(prompts, kind, ignore_columns),
            prompts_only,
            force,
            or_nearest=frozenset(name for name in precisions if "=" not in name),
        )
        check_out(out, force)  # before anything is fetched
        source = find_source(backbone, weights, preset, settings, weights_file, loras, decoder, accept_licence, _say)
        bundle = write(source, out, options, _say)
    click.echo(bundle.described())
    _say(f"next: snoopi-rt generate --bundle {quote(out)}")


def _say(line: str) -> None:
    click.echo(visible(line), err=True)


def _precisions(given: tuple[str, ...]) -> dict[str, list[str]]:
    """The precisions of each graph in the order in which they were given."""
    from snoopi_rt.runtime.precision import parse_precision

    chosen: dict[str, list[str]] = {}
    for text in given:
        for graph, name in parse_precision(text).items():
            chosen.setdefault(graph, []).append(name)
    return chosen


def _sizes(text: str | None) -> tuple[tuple[int, int], ...]:
    """(height, width) of each size in `text`, which says the width first."""
    from snoopi_rt.request import parse_size

    sizes = []
    for size in text.split(",") if text else ():
        sizes.append(parse_size(size.strip()))
    return tuple(dict.fromkeys(sizes))


def _texts(path: Path | None, kind: str | None, ignore_columns: bool) -> tuple[str, ...]:
    """The prompts and negative prompts in a file. Raises InputError for a row that has none."""
    from snoopi_rt.batch.prompt_file import PromptFile, texts_of

    if path is None:
        if kind is not None or ignore_columns:
            raise InputError("--prompts-format and --ignore-columns go with --prompts FILE")
        return ()
    texts: list[str] = []
    with PromptFile(path, kind, ignore_columns) as rows:
        for _, place, job in rows.rows():
            try:
                texts += texts_of(job)
            except InputError as error:
                raise InputError(f"{path} {place}: {error}") from error
    return tuple(texts)


@contextmanager
def building(command: str, extra: str, out: Path) -> Iterator[None]:
    """Say which extra a command needs where a package is missing, which file cannot be read, and, before the work begins, why `out`
    cannot be written."""
    try:
        if out != Path():
            check_place(out / "config.json")
    except OSError as error:
        raise OutputError(f"cannot write {quote(out)}: {reason(error)}") from error
    try:
        yield
    except (SnoopiError, BrokenPipeError):
        raise
    except ImportError as error:
        raise EngineMissing(f"{command} needs {error.name}: {how_to_install(extra)}") from error
    except OSError as error:
        raise _file_error(error, command, out) from error


_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
"""What the system says only to those who write."""


def _file_error(error: OSError, command: str, out: Path) -> SnoopiError:
    """The error of a command that writes into `out`, and beside it while the work is not done, and reads all other files."""
    writing = error.errno in _WRITING
    if error.filename is None:
        return OutputError(f"cannot write {quote(out)}: {reason(error)}") if writing else SnoopiError(f"{command}: {reason(error)}")
    file, whole = (Path(os.path.abspath(path)) for path in (os.fsdecode(error.filename), out))
    if any(file.is_relative_to(place) for place in (whole, hidden(whole, ".part"), hidden(whole, ".old"))):
        return OutputError(f"cannot write {quote(out)}: {reason(error)}")
    path = quote(os.fsdecode(error.filename))
    return OutputError(f"cannot write {path}: {reason(error)}") if writing else InputError(f"cannot read {path}: {reason(error)}")
