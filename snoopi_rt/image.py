"""Images on disk, with the text that makes them again: PNG text chunks, or JSON in the EXIF description of JPEG and WebP."""

import io
import json
import os
import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from snoopi_rt.engines.base import InputError, OutputError
from snoopi_rt.files import open_regular, reason, write_whole
from snoopi_rt.json_reader import parse_json

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
READ = ("PNG", "JPEG", "WEBP")
LARGEST = 2**28
"""Bytes of an image whose metadata are read: Pillow takes all of a WebP into memory."""
DESCRIPTION = 0x010E
"""EXIF's ImageDescription."""
MARK = "snoopi_rt"
"""The key that every image of ours has: the version that made it."""
OPTIONS = {
    "negative_prompt": "--neg",
    "negative_scale": "--neg-scale",
    "seed": "--seed",
    "size": "--size",
    "engine": "--engine",
    "precision": "--precision",
}


def encode(image: np.ndarray, format: str, metadata: Mapping[str, str], quality: int = 95) -> bytes:
    """The file of a uint8 (H, W, 3) image in one of FORMATS; quality, 0 to 100, is that of JPEG and WebP.

    Raises OutputError for metadata beyond the 64 kB of a JPEG.
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
    except ValueError as error:
        raise OutputError(f"the prompt is too long for this format ({error}): ask for png") from error
    return data.getvalue()


def save(image: np.ndarray, path: Path, metadata: Mapping[str, str], force: bool = False) -> None:
    """Writes a uint8 (H, W, 3) image whole or not at all, in the format of the name's ending.

    Raises InputError and OutputError as `check_writable` does, and OutputError as `encode` does.
    """
    check_writable(path, force)
    try:
        file = encode(image, FORMATS[path.suffix.lower()], metadata)
    except OutputError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    write(file, path)


def write(file: bytes, path: Path) -> None:
    """Writes an encoded image whole or not at all. Raises OutputError."""
    try:
        write_whole(path, file)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {reason(error)}") from error


def check_writable(path: Path, force: bool = False) -> None:
    """Returns when an image can be saved there, so that nobody waits for one that cannot.

    Raises InputError for an unknown ending and, without `force`, for an existing file; OutputError where the folder is not there or closed.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path} must end in {', '.join(FORMATS)}")
    if os.path.exists(path) and not force:
        raise InputError(f"{path} is there already: choose another name, or --force to replace it")
    if os.path.isdir(path):
        raise OutputError(f"cannot write {path}: it is a folder")
    if not os.path.isdir(path.parent):
        raise OutputError(f"cannot write {path}: {path.parent} is not a folder")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"cannot write {path}: no permission in {path.parent}")


def read_metadata(path: Path) -> dict[str, str]:
    """The text that `save` put into the image. Raises InputError where there is no image, or none of ours."""
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > LARGEST:
                raise OSError(f"it has more than {LARGEST} bytes")
            found = _texts(file)
    except OSError as error:
        raise InputError(f"{path} is not an image: {reason(error)}") from error
    if MARK not in found:
        raise InputError(f"{path} does not say how it was made: it is not from snoopi-rt, or its metadata was removed")
    return found


def _texts(file: BinaryIO) -> dict[str, str]:
    """The texts in an image of the formats that we write, whose pixels are not decoded. Raises OSError where it is none of them."""
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about sizes and damage: the pixels are not read
        try:
            with Image.open(file, formats=READ) as picture:
                if picture.format == "PNG":
                    found: Any = picture.info
                else:
                    found = parse_json(picture.getexif().get(DESCRIPTION, "{}"))
        except UnidentifiedImageError:
            raise OSError("unknown format") from None
        except OSError:
            raise
        except Exception:  # Pillow raises whatever goes wrong in an odd file; and a description of somebody else is no JSON
            return {}
    return {key: str(value) for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def command(metadata: Mapping[str, str], foreign: bool) -> str:
    """The shell command that makes the image again; a `foreign` bundle is given by its name."""
    words = ["snoopi-rt", "generate"]
    for key, option in OPTIONS.items():
        if key in metadata:
            words += [option, metadata[key]]
    if "truncate" in metadata:
        words.append("--truncate")
    if foreign:
        words += ["--bundle", metadata.get("bundle", "unknown")]
    return shlex.join([*words, "--", metadata.get("prompt", "")])
