"""Emoji drawings as RGBA sprites: npm packages of permissively licensed icon sets, fetched by name and version and drawn by resvg.

Twemoji and EmojiOne 2, the sets of the evaluation, are never trained on.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from snoopi_rt.errors import SnoopiError
from snoopi_rt.export.small_model.dataset.vocabulary import Thing, things
from snoopi_rt.files import write_whole

SIDE = 256  # pixels


@dataclass(frozen=True)
class DrawingSet:
    """A set of drawings: an npm package, the word for its style and the licence of the art."""

    package: str
    version: str
    style: str
    licence: str
    upstream: str


_MICROSOFT = ("MIT", "github.com/microsoft/fluentui-emoji, (c) Microsoft Corporation")
TRAINED = (
    DrawingSet("@lobehub/fluent-emoji-3d", "1.1.0", "3d", *_MICROSOFT),
    DrawingSet("@iconify-json/fluent-emoji-flat", "1.2.6", "flat", *_MICROSOFT),
    DrawingSet("@iconify-json/noto", "1.2.9", "cartoon", "Apache-2.0", "github.com/googlefonts/noto-emoji, (c) Google LLC"),
)
UNSEEN = (
    DrawingSet("@iconify-json/twemoji", "1.2.5", "twemoji", "CC BY 4.0", "github.com/jdecked/twemoji"),
    DrawingSet("@iconify-json/emojione", "1.2.3", "emojione", "CC BY 4.0", "github.com/EmojiTwo/emojitwo"),
)
NAMES = DrawingSet("@iconify-json/noto", "1.2.9", "", "", "")
"""The set whose names vocabulary.txt uses."""


def load_sprites(folder: Path, drawings: Iterable[DrawingSet] = TRAINED) -> dict[tuple[str, str], Image.Image]:
    """RGBA sprites of SIDE x SIDE pixels by (thing, style), fetched into `folder` once and kept there as one array per set.

    A thing that a set lacks is left out. Raises SnoopiError if npm is missing or fails.
    """
    sprites = {}
    for drawing in drawings:
        for name, array in _drawn(drawing, folder).items():
            sprites[name, drawing.style] = Image.fromarray(array, "RGBA")
    return sprites


def stored(folder: Path, drawing: DrawingSet) -> Path:
    """The file of a set's drawings: `names` of all things, and `s0`, `s1`, ... (SIDE, SIDE, 4) uint8 of those that it has."""
    return folder / f"{_folder_name(drawing)}-{SIDE}.npz"


def _drawn(drawing: DrawingSet, folder: Path) -> dict[str, np.ndarray]:
    path = stored(folder, drawing)
    names = [thing.name for thing in things()]
    if path.exists():
        with np.load(path) as archive:
            if list(archive["names"]) == names:
                return {name: archive[f"s{i}"] for i, name in enumerate(names) if f"s{i}" in archive}
    drawings = dict(_read(drawing, folder))
    buffer = io.BytesIO()
    arrays = {"names": np.array(names), **{f"s{i}": drawings[name] for i, name in enumerate(names) if name in drawings}}
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_whole(path, buffer.getvalue())
    return drawings


def _read(drawing: DrawingSet, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    root = fetch(drawing.package, drawing.version, folder)
    codes = code_points(folder)
    rendered = {path.stem.replace("-fe0f", ""): path for path in (root / "assets").glob("*")}  # named by code point
    icons = {} if rendered else json.loads((root / "icons.json").read_text(encoding="utf-8"))
    own_names = {}
    if not rendered and (root / "chars.json").exists():
        own_names = {
            code.replace("-fe0f", ""): name for code, name in json.loads((root / "chars.json").read_text(encoding="utf-8")).items()
        }
    for thing in tqdm(things(), desc=drawing.style, unit="drawing"):
        code = codes[thing.name]
        if rendered:
            if code in rendered:
                yield thing.name, _squared(Image.open(rendered[code]))
            continue
        for icon in (own_names.get(code, ""), *thing.icons):
            if icon in icons["icons"]:
                yield thing.name, _render(icons, icon)
                break


def code_points(folder: Path) -> dict[str, str]:
    """The code points of each thing's emoji, joined by hyphens, without the variation selector."""
    table = json.loads((fetch(NAMES.package, NAMES.version, folder) / "chars.json").read_text(encoding="utf-8"))
    codes = {name: code.replace("-fe0f", "") for code, name in table.items()}
    return {thing.name: _code(thing, codes) for thing in things()}


def _code(thing: Thing, codes: dict[str, str]) -> str:
    for icon in thing.icons:
        if icon in codes:
            return codes[icon]
    raise SnoopiError(f"no emoji is called {thing.icons[0]!r}")


def _render(icons: dict, name: str) -> np.ndarray:
    import resvg_py

    icon = icons["icons"][name]
    box = f"0 0 {icon.get('width', icons['width'])} {icon.get('height', icons['height'])}"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True))
    return _squared(Image.open(io.BytesIO(png)))


def _squared(image: Image.Image) -> np.ndarray:
    """The drawing in the middle of a square and as large as it fits, since sets leave different margins."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    if box is None:
        raise SnoopiError("an empty drawing")
    image = image.crop(box)
    scale = SIDE / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SIDE, SIDE))
    square.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.asarray(square)


def fetch(package: str, version: str, folder: Path) -> Path:
    """The unpacked npm package, fetched into `folder` once."""
    root = folder / f"{package.replace('/', '-').lstrip('@')}-{version}"
    if root.exists():
        return root
    npm = shutil.which("npm")
    if npm is None:
        raise SnoopiError("the emoji drawings come from npm packages, and npm is not installed: install Node.js (https://nodejs.org)")
    folder.mkdir(parents=True, exist_ok=True)
    # A folder of its own, since another process may be fetching the same package.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as beside:
        command = [npm, "pack", f"{package}@{version}", "--silent"]
        done = subprocess.run(command, cwd=beside, capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[0]
            raise SnoopiError(f"npm pack {package}@{version} failed: {reason}")
        with tarfile.open(Path(beside) / done.stdout.split()[-1]) as archive:
            archive.extractall(beside, filter="data")
        with contextlib.suppress(OSError):  # another process was first
            os.replace(Path(beside) / "package", root)
    return root


def _folder_name(drawing: DrawingSet) -> str:
    return f"{drawing.package.replace('/', '-').lstrip('@')}-{drawing.version}"
