"""Emoji drawings as RGBA sprites: permissively licensed icon sets, which ship in `drawings` as tools/drawings.py took them from npm.

Twemoji, by which pictures are judged, is never trained on.
"""

import io
import zipfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from snoopi_rt.errors import SnoopiError
from snoopi_rt.export.small_model.dataset.vocabulary import things

SIDE = 256  # pixels


@dataclass(frozen=True)
class DrawingSet:
    """A set of drawings: the npm package that they were taken from, the word for their style and the licence of the art."""

    package: str
    style: str
    licence: str
    upstream: str

    @property
    def path(self) -> Path:
        """The zip file of its drawings, THING.svg or THING.webp each."""
        return Path(__file__).with_name("drawings") / f"{self.style}.zip"


_MICROSOFT = ("MIT", "github.com/microsoft/fluentui-emoji, (c) Microsoft Corporation")
TRAINED = (
    DrawingSet("@lobehub/fluent-emoji-3d@1.1.0", "3d", *_MICROSOFT),
    DrawingSet("@iconify-json/fluent-emoji-flat@1.2.6", "flat", *_MICROSOFT),
    DrawingSet("@iconify-json/noto@1.2.9", "cartoon", "Apache-2.0", "github.com/googlefonts/noto-emoji, (c) Google LLC"),
)
UNSEEN = DrawingSet("@iconify-json/twemoji@1.2.5", "twemoji", "CC BY 4.0", "github.com/jdecked/twemoji, (c) Twitter and contributors")


def load_sprites(drawings: Iterable[DrawingSet] = TRAINED, names: Collection[str] | None = None) -> dict[tuple[str, str], Image.Image]:
    """RGBA sprites of SIDE x SIDE pixels by (thing, style). names: of things; None takes all. A thing that a set lacks is left out."""
    sprites = {}
    for drawing in drawings:
        with zipfile.ZipFile(drawing.path) as archive:
            files = {Path(file).stem: file for file in archive.namelist()}
            there = [thing.name for thing in things() if thing.name in files and (names is None or thing.name in names)]
            for name in tqdm(there, desc=f"{drawing.style} drawings", unit="drawing", leave=False, disable=len(there) < 50):
                sprites[name, drawing.style] = Image.fromarray(_squared(_opened(files[name], archive.read(files[name]))), "RGBA")
    return sprites


def _opened(file: str, data: bytes) -> Image.Image:
    if file.endswith(".svg"):
        import resvg_py

        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=SIDE, height=SIDE, skip_system_fonts=True))
    return Image.open(io.BytesIO(data))


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
