"""Writes export/small_model/dataset/drawings: the emoji drawings of all things, taken from npm packages. To be run again when
vocabulary.txt changes; needs npm.

    python tools/drawings.py --packages runs/npm
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click

from snoopi_rt.export.small_model.dataset.sprites import TRAINED, UNSEEN, DrawingSet
from snoopi_rt.export.small_model.dataset.vocabulary import Thing, things

NAMES = "@iconify-json/noto@1.2.9"
"""The package whose names vocabulary.txt uses; its chars.json gives their code points."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The date of every entry, so that the same drawings give the same file."""


@click.command()
@click.option("--packages", type=click.Path(path_type=Path), required=True, help="Folder to keep the npm packages in.")
def main(packages: Path) -> None:
    """Write one zip file for each set of drawings."""
    for drawing in (*TRAINED, UNSEEN):
        with zipfile.ZipFile(drawing.path, "w") as archive:
            count = 0
            for count, (name, data) in enumerate(read(drawing, packages), 1):  # noqa: B007 - the last one is printed
                kind = zipfile.ZIP_DEFLATED if name.endswith(".svg") else zipfile.ZIP_STORED
                archive.writestr(zipfile.ZipInfo(name, EPOCH), data, kind, 9)
        click.echo(f"{drawing.path.name}: {count} drawings, {drawing.path.stat().st_size / 1e6:.2f} MB")


def read(drawing: DrawingSet, packages: Path) -> Iterator[tuple[str, bytes]]:
    """The file name and contents of each thing's drawing; a thing that the set lacks is left out."""
    root, codes = fetch(drawing.package, packages), code_points(packages)
    rendered = {path.stem.replace("-fe0f", ""): path for path in (root / "assets").glob("*")}  # named by code point
    if rendered:
        yield from ((f"{thing.name}{path.suffix}", path.read_bytes()) for thing in things() if (path := rendered.get(codes[thing.name])))
        return
    icons = json.loads((root / "icons.json").read_text(encoding="utf-8"))
    own_names = by_code(root) if (root / "chars.json").exists() else {}
    for thing in things():
        names = [name for name in (own_names.get(codes[thing.name], ""), *thing.icons) if name in icons["icons"]]
        if names:
            icon = icons["icons"][names[0]]
            box = f"0 0 {icon.get('width', icons['width'])} {icon.get('height', icons['height'])}"
            yield f"{thing.name}.svg", f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'.encode()


def code_points(packages: Path) -> dict[str, str]:
    """The code points of each thing's emoji, joined by hyphens, without the variation selector."""
    codes = {name: code for code, name in by_code(fetch(NAMES, packages)).items()}
    return {thing.name: code_point(thing, codes) for thing in things()}


def by_code(root: Path) -> dict[str, str]:
    """The names of a package's drawings by their code points."""
    table = json.loads((root / "chars.json").read_text(encoding="utf-8"))
    return {code.replace("-fe0f", ""): name for code, name in table.items()}


def code_point(thing: Thing, codes: dict[str, str]) -> str:
    for icon in thing.icons:
        if icon in codes:
            return codes[icon]
    raise click.ClickException(f"no emoji is called {thing.icons[0]!r}")


def fetch(package: str, packages: Path) -> Path:
    """The unpacked npm package, fetched once."""
    root = packages / re.sub("[/@]", "-", package.lstrip("@"))
    if root.exists():
        return root
    npm = shutil.which("npm")
    if npm is None:
        raise click.ClickException("npm is not installed: install Node.js (https://nodejs.org)")
    packages.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=packages, prefix=".fetching-") as beside:
        done = subprocess.run([npm, "pack", package, "--silent"], cwd=beside, capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            raise click.ClickException(f"npm pack {package} failed: {(done.stderr.strip() or 'no message').splitlines()[0]}")
        with tarfile.open(Path(beside) / done.stdout.split()[-1]) as archive:
            archive.extractall(beside, filter="data")
        with contextlib.suppress(OSError):  # another process was first
            os.replace(Path(beside) / "package", root)
    return root


if __name__ == "__main__":
    main()
