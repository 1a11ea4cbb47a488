"""Image files with the metadata to draw them again: PNG text chunks, or JSON in the EXIF description of JPEG and WebP."""

import io
import json
import os
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from snoopi_rt.errors import InputError, OutputError
from snoopi_rt.files import check_place, open_regular, reason, write_whole
from snoopi_rt.json_reader import parse_json
from snoopi_rt.request import integer
from snoopi_rt.shell import join, quote

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
READ = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 2**28
"""Bytes of an image whose metadata are read: Pillow loads all of a WebP into memory."""
DESCRIPTION = 0x010E
"""EXIF's ImageDescription."""
VERSION_KEY = "snoopi_rt"
"""The metadata key that all our images have: the version that drew them."""
Condition = Literal["missing", "whole", "damaged", "foreign"]
OPTIONS = {
    "negative_prompt": "--neg",
    "negative_scale": "--neg-scale",
    "seed": "--seed",
    "size": "--size",
    "engine": "--engine",
    "precision": "--precision",
}
IfExists = Literal["refuse", "replace", "count"]
"""What to do if the file exists: raise an error, replace it, or use NAME-2, NAME-3 and so on."""
SWITCHES = {"truncate": "--truncate", "side_by_side": "--side-by-side"}


def encode(image: np.ndarray, format: str, metadata: Mapping[str, str], quality: int = 95) -> bytes:
    """A uint8 (H, W, 3) image encoded in one of FORMATS; quality, 0 to 100, applies to JPEG and WebP.

    Raises InputError for another quality, OutputError for more metadata (64 kB) or pixels than JPEG and WebP support.
    """
    integer("quality", quality, 0, 100)
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    picture, data = Image.fromarray(image), io.BytesIO()
    if format == "png":
        texts = PngInfo()
        for key, value in metadata.items():
            texts.add_text(key, value)
        # A quarter of zlib's usual time, which is two thirds of what drawing takes, for files 7 % larger.
        picture.save(data, "png", pnginfo=texts, compress_type=zlib.Z_RLE)
        return data.getvalue()
    exif = Image.Exif()
    exif[DESCRIPTION] = json.dumps(dict(metadata))
    try:
        picture.save(data, format, quality=quality, exif=exif)
    except (OSError, ValueError) as error:
        raise OutputError(f"{format} cannot hold it ({error}): use png") from error
    return data.getvalue()


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """The images (n, H, W, 3) in a grid, row by row; empty cells are white."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    cells = np.full((rows * columns, height, width, 3), 255, np.uint8)
    cells[:count] = images
    return cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def save(image: np.ndarray, path: Path, metadata: Mapping[str, str], if_exists: IfExists = "refuse") -> Path:
    """Writes a uint8 (H, W, 3) image atomically, in the format of the file's ending; returns its path.

    Creates missing folders. Raises what `check_writable` raises, and OutputError.
    """
    check_writable(path, if_exists)
    try:
        file = encode(image, FORMATS[path.suffix.lower()], metadata)
    except OutputError as error:
        raise OutputError(f"cannot write {quote(path)}: {error}") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create the folder {quote(path.parent)}: {reason(error)}") from error
    original, number = path, 1
    while True:
        try:
            write(file, path, new=if_exists != "replace")
            return path
        except FileExistsError as error:
            if if_exists != "count":
                raise _exists(path) from error
        while os.path.lexists(path):
            number += 1
            path = original.with_stem(f"{original.stem}-{number}")


def write(file: bytes, path: Path, new: bool = False) -> None:
    """Writes an encoded image atomically. Raises OutputError, and with `new` FileExistsError if the file exists."""
    try:
        write_whole(path, file, new=new)
    except FileExistsError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {quote(path)}: {reason(error)}") from error


def check_writable(path: Path, if_exists: IfExists = "refuse") -> None:
    """Checks in advance that an image can be saved there.

    Raises InputError for an unknown ending and for an existing file that is not to be replaced; OutputError for a name that is too long
    and a folder that can be neither written nor created.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{quote(path)} must end in {', '.join(FORMATS)}")
    if os.path.isdir(path):
        raise OutputError(f"cannot write {quote(path)}: it is a folder")
    if os.path.lexists(path) and if_exists == "refuse":
        raise _exists(path)
    try:
        check_place(path)
    except OSError as error:
        raise OutputError(f"cannot write {quote(path)}: {reason(error)}") from error


def _exists(path: Path) -> InputError:
    return InputError(f"{quote(path)} already exists: choose another name, or replace it with --force")


def condition(path: Path, size: int | None = None) -> Condition:
    """The condition of an image file: "missing" or empty; "whole" if its beginning, end and size fit its format; "damaged" if only its
    beginning fits, or is zeros; "foreign" for anything else, such as a folder.
    """
    try:
        with open_regular(path) as file:
            length = os.fstat(file.fileno()).st_size
            begin = file.read(12)
            file.seek(max(0, length - 8))
            end = file.read(8)
    except FileNotFoundError:
        return "missing"
    except OSError:
        return "foreign"
    if not length:
        return "missing"
    ours, complete = _ends(FORMATS[path.suffix.lower()], begin, end, length)
    if not complete:
        return "damaged" if ours or not begin.strip(b"\0") else "foreign"
    return "whole" if size in (None, length) else "foreign"


def _ends(format: str, begin: bytes, end: bytes, length: int) -> tuple[bool, bool]:
    """Whether a file begins as one in that format, and whether it also ends as one."""
    if format == "png":
        ours, complete = begin[:8] == b"\x89PNG\r\n\x1a\n", end == b"IEND\xaeB`\x82"
    elif format == "jpeg":
        ours, complete = begin[:3] == b"\xff\xd8\xff", end[-2:] == b"\xff\xd9"
    else:
        ours, complete = begin[:4] + begin[8:] == b"RIFFWEBP", length == int.from_bytes(begin[4:8], "little") + 8
    return ours, ours and complete


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata that `save` wrote. Raises InputError if the file is not an image, or not one of ours."""
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise OSError(f"it has more than {MAX_BYTES} bytes")
            texts = _texts(file)
    except OSError as error:
        raise InputError(f"{quote(path)} cannot be read: {reason(error)}") from error
    if VERSION_KEY not in texts:
        raise InputError(f"{quote(path)} has no metadata of snoopi-rt: it was drawn by another program, or its metadata was removed")
    return texts


def _texts(file: BinaryIO) -> dict[str, str]:
    """The text metadata of an image in a format that we write; its pixels are not decoded. Raises OSError for any other file."""
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of sizes and damage, but the pixels are not read
        try:
            with Image.open(file, formats=READ) as picture:
                if picture.format == "PNG":
                    texts: Any = picture.info
                else:
                    texts = parse_json(picture.getexif().get(DESCRIPTION, "{}"))
        except UnidentifiedImageError:
            raise OSError("it is not a valid PNG, JPEG or WebP image") from None
        except OSError:
            raise
        except Exception:  # Pillow raises errors of any kind for odd files, and other programs' descriptions are not JSON
            return {}
    return {key: str(value) for key, value in texts.items() if isinstance(value, str)} if isinstance(texts, dict) else {}


def command(metadata: Mapping[str, str], bundle: str | Path | None) -> str:
    """The shell command that draws the image again with the bundle in that folder; None means the embedded one."""
    words = []
    for option, value in [*((option, metadata.get(key)) for key, option in OPTIONS.items()), ("--bundle", bundle)]:
        if value is not None:
            words += [f"{option}={value}"] if str(value).startswith("-") else [option, str(value)]
    words += [option for key, option in SWITCHES.items() if key in metadata]
    prompt = metadata.get("prompt", "")
    if prompt == "-":  # alone it means standard input; outer white space is ignored
        prompt = " -"
    return join(["snoopi-rt", "generate", *([*words, "--", prompt] if prompt.startswith("-") else [prompt, *words])])
