"""`snoopi-rt info`."""

import os
from pathlib import Path

import click

from snoopi_rt.errors import InputError
from snoopi_rt.shell import json_line, quote, visible


@click.command(epilog="Example: snoopi-rt info image.png")
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--verify", is_flag=True, help="Hash every file of the bundle again.")
@click.option("--vocabulary", is_flag=True, help="List the objects, colours and styles that the bundle's model knows.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one line of JSON: all of bundle.json, only its --vocabulary, or an image's metadata.",
)
def info(path: Path | None, verify: bool, vocabulary: bool, as_json: bool) -> None:
    """Describe a bundle, or print the command that made an image. Without PATH: the embedded bundle."""
    from snoopi_rt.bundle.bundle import Bundle
    from snoopi_rt.bundle.typed_json import to_json
    from snoopi_rt.engines import conflict, installed
    from snoopi_rt.image import read_metadata
    from snoopi_rt.pipeline import EMBEDDED

    if path is not None and not os.path.exists(path):
        raise InputError(f"no such file or folder: {quote(path)}")
    if path is not None and os.path.isfile(path):
        if vocabulary or verify:
            raise InputError(f"{'--vocabulary' if vocabulary else '--verify'} needs a bundle's folder, and {quote(path)} is a file")
        if as_json:
            click.echo(json_line(read_metadata(path)))
        else:
            _print_command(path)
        return
    bundle = Bundle.load(EMBEDDED if path is None else path)
    if verify:
        bundle.verify()
    if vocabulary:
        words = bundle.vocabulary
        lines = words.described().splitlines() if words else [f"bundle {bundle.name!r} has no vocabulary: its model is not a narrow one"]
        click.echo(json_line(words and to_json(words)) if as_json else "\n".join(map(visible, lines)))
        return
    if as_json:
        place = {"folder": str(bundle.folder), "hash": bundle.hash, "installed_engines": list(installed())}
        click.echo(json_line({**to_json(bundle), **place}))
        return
    click.echo(bundle.described())
    click.echo(f"folder: {quote(bundle.folder)}")
    click.echo(f"installed engines: {', '.join(installed()) or 'none'}{conflict()}")


def _print_command(path: Path) -> None:
    """Prints the command that made an image. Raises InputError for one that was not made by snoopi-rt."""
    from snoopi_rt import image
    from snoopi_rt.bundle.bundle import MANIFEST
    from snoopi_rt.bundle.verify import find_folder
    from snoopi_rt.cache import Cache
    from snoopi_rt.files import sha256
    from snoopi_rt.pipeline import EMBEDDED

    metadata, manifest = image.read_metadata(path), EMBEDDED / MANIFEST
    hash = metadata.get("bundle_hash", "unknown")
    if manifest.is_file() and hash == sha256(manifest):
        click.echo(image.command(metadata, None))
        return
    folder = find_folder(hash, Cache())
    click.echo(image.command(metadata, folder or "FOLDER"))
    if folder is None:
        name = quote(metadata.get("bundle", "unknown"))
        click.echo(f"replace FOLDER by the folder of bundle {name} (hash {quote(hash)}): it has not been loaded on this machine", err=True)
