"""Images on disk, with the text that makes them again: PNG text chunks, or JSON in the EXIF description of JPEG and WebP."""

import io
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from snoopi_rt.errors import InputError, OutputError
from snoopi_rt.files import check_place, open_regular, reason, write_whole
from snoopi_rt.json_reader import parse_json
from snoopi_rt.shell import join, quote

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
READ = ("PNG", "JPEG", "WEBP")
LARGEST = 2**28
"""Bytes of an image whose metadata are read: Pillow takes all of a WebP into memory."""
DESCRIPTION = 0x010E
"""EXIF's ImageDescription."""
MARK = "snoopi_rt"
"""The key that every image of ours has: the version that made it."""
Condition = Literal["missing", "whole", "damaged", "foreign"]
OPTIONS = {
    "negative_prompt": "--neg",
    "negative_scale": "--neg-scale",
    "seed": "--seed",
    "size": "--size",
    "engine": "--engine",
    "precision": "--precision",
}
Taken = Literal["refuse", "replace", "count"]
"""What becomes of a name that is taken: an error, a replaced file, or NAME-2, NAME-3 and so on."""
SWITCHES = {"truncate": "--truncate", "side_by_side": "--side-by-side"}


def encode(image: np.ndarray, format: str, metadata: Mapping[str, str], quality: int = 95) -> bytes:
    """The file of a uint8 (H, W, 3) image in one of FORMATS; quality, 0 to 100, is that of JPEG and WebP.

    Raises OutputError for more metadata (64 kB) or pixels than JPEG and WebP can hold.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    picture, data = Image.fromarray(image), io.BytesIO()
    if format == "png":
        texts = PngInfo()
        for key, value in metadata.items():
            texts.add_text(key, value)
        picture.save(data, "png", pnginfo=texts)
        return data.getvalue()
    exif = Image.Exif()
    exif[DESCRIPTION] = json.dumps(dict(metadata))
    try:
        picture.save(data, format, quality=quality, exif=exif)
    except (OSError, ValueError) as error:
        raise OutputError(f"{format} cannot hold it ({error}): ask for png") from error
    return data.getvalue()


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """The images (n, H, W, 3) as one, row by row; places without one are white."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    places = np.full((rows * columns, height, width, 3), 255, np.uint8)
    places[:count] = images
    return places.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def save(image: np.ndarray, path: Path, metadata: Mapping[str, str], taken: Taken = "refuse") -> Path:
    """Writes a uint8 (H, W, 3) image whole or not at all, in the format of the name's ending, and returns its path.

    Makes folders that are missing. `taken`: what becomes of a file that is there. Raises as `check_writable` does, and OutputError.
    """
    check_writable(path, taken)
    try:
        file = encode(image, FORMATS[path.suffix.lower()], metadata)
    except OutputError as error:
        raise OutputError(f"cannot write {quote(path)}: {error}") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {quote(path.parent)}: {reason(error)}") from error
    chosen, number = path, 1
    while True:
        try:
            write(file, path, new=taken != "replace")
            return path
        except FileExistsError as error:
            if taken != "count":
                raise _taken(path) from error
        while os.path.lexists(path):
            number += 1
            path = chosen.with_stem(f"{chosen.stem}-{number}")


def write(file: bytes, path: Path, new: bool = False) -> None:
    """Writes an encoded image whole or not at all. Raises OutputError, and FileExistsError where it is to be `new` and is not."""
    try:
        write_whole(path, file, new=new)
    except FileExistsError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {quote(path)}: {reason(error)}") from error


def check_writable(path: Path, taken: Taken = "refuse") -> None:
    """Returns when an image can be saved there, so that nobody waits for one that cannot.

    Raises InputError for an unknown ending and an existing file that is not to be replaced; OutputError for a name that is too long and a
    folder that can be neither written nor made.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{quote(path)} must end in {', '.join(FORMATS)}")
    if os.path.isdir(path):
        raise OutputError(f"cannot write {quote(path)}: it is a folder")
    if os.path.lexists(path) and taken == "refuse":
        raise _taken(path)
    try:
        check_place(path)
    except OSError as error:
        raise OutputError(f"cannot write {quote(path)}: {reason(error)}") from error


def _taken(path: Path) -> InputError:
    return InputError(f"{quote(path)} is there already: choose another name, or --force to replace it")


def condition(path: Path, size: int | None = None) -> Condition:
    """How the file that the path leads to is: "missing", also without a byte; "whole" where it begins and ends as its name promises and has
    that size; "damaged" where it begins so, or with zeros, and ends otherwise; "foreign" for anything else, such as a folder.
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
    """Whether a file begins as one of that format, and also ends so."""
    if format == "png":
        ours, complete = begin[:8] == b"\x89PNG\r\n\x1a\n", end == b"IEND\xaeB`\x82"
    elif format == "jpeg":
        ours, complete = begin[:3] == b"\xff\xd8\xff", end[-2:] == b"\xff\xd9"
    else:
        ours, complete = begin[:4] + begin[8:] == b"RIFFWEBP", length == int.from_bytes(begin[4:8], "little") + 8
    return ours, ours and complete


def read_metadata(path: Path) -> dict[str, str]:
    """The text that `save` put into the image. Raises InputError where there is no image, or none of ours."""
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > LARGEST:
                raise OSError(f"it has more than {LARGEST} bytes")
            texts = _texts(file)
    except OSError as error:
        raise InputError(f"{quote(path)} cannot be read: {reason(error)}") from error
    if MARK not in texts:
        raise InputError(f"{quote(path)} does not say how it was made: it is not from snoopi-rt, or its metadata was removed")
    return texts


def _texts(file: BinaryIO) -> dict[str, str]:
    """The texts in an image of the formats that we write, whose pixels are not decoded. Raises OSError where it is none of them."""
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about sizes and damage: the pixels are not read
        try:
            with Image.open(file, formats=READ) as picture:
                if picture.format == "PNG":
                    texts: Any = picture.info
                else:
                    texts = parse_json(picture.getexif().get(DESCRIPTION, "{}"))
        except UnidentifiedImageError:
            raise OSError("it is no whole PNG, JPEG or WebP image") from None
        except OSError:
            raise
        except Exception:  # Pillow raises whatever goes wrong in an odd file; and a description of somebody else is no JSON
            return {}
    return {key: str(value) for key, value in texts.items() if isinstance(value, str)} if isinstance(texts, dict) else {}


def command(metadata: Mapping[str, str], bundle: str | Path | None) -> str:
    """The shell command that makes the image again with the bundle in that folder, None: the embedded one."""
    words = []
    for option, value in [*((option, metadata.get(key)) for key, option in OPTIONS.items()), ("--bundle", bundle)]:
        if value is not None:
            words += [f"{option}={value}"] if str(value).startswith("-") else [option, str(value)]
    words += [option for key, option in SWITCHES.items() if key in metadata]
    prompt = metadata.get("prompt", "")
    if prompt == "-":  # alone it is standard input, and outer white space changes nothing
        prompt = " -"
    return join(["snoopi-rt", "generate", *([*words, "--", prompt] if prompt.startswith("-") else [prompt, *words])])
