"""Sets of images with their prompts: made here in batches that can be resumed, or made by another program and checked one by one."""

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from snoopi_rt.batch.prompt_file import PromptFile
from snoopi_rt.errors import InputError
from snoopi_rt.export.evaluation.samplers import Sampler
from snoopi_rt.export.evaluation.statistics import spread
from snoopi_rt.files import check_folder, remove_remains, sha256, write_whole

BATCH = 16
"""Images made together. Always the same ones, however often a run was stopped: a batch may change an image's last bits."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
COLUMNS = ("prompt", "negative_prompt", "seed", "style", "file")
_SET = "set.json"


@dataclass(frozen=True)
class PromptRow:
    """A prompt of a file. style: the group that a mean is reported of; file: its image, if the set is another program's."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    style: str | None = None
    file: str | None = None


@dataclass(frozen=True)
class ImageSet:
    """Images, one per row, in order. seeds: None if another program made them. facts: what they are, for the report."""

    name: str
    files: tuple[Path, ...]
    rows: tuple[PromptRow, ...] = ()
    seeds: tuple[int, ...] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        return [row.prompt for row in self.rows]

    @cached_property
    def hashes(self) -> list[str]:
        """The SHA-256 of each file."""
        with ThreadPoolExecutor(4) as threads:
            return list(threads.map(sha256, self.files))

    @cached_property
    def hash(self) -> str:
        """Of all files, in order."""
        return hashlib.sha256("".join(self.hashes).encode()).hexdigest()

    def open(self, index: int) -> Image.Image:
        """One image, as RGB. Raises InputError, which names it, if it is missing or damaged."""
        return open_image(self.files[index])

    def pictures(self) -> Iterator[np.ndarray]:
        """All images, (H, W, 3) uint8 each."""
        for index in range(len(self.files)):
            yield np.asarray(self.open(index))

    def check(self) -> dict[str, Any]:
        """Decodes every image; how many there are of each size, and of each colour mode that is not RGB.

        Raises InputError for the first that is damaged.
        """
        sizes: Counter[str] = Counter()
        modes: Counter[str] = Counter()
        for file in tqdm(self.files, desc=f"checking {self.name}", unit="image", leave=False, disable=len(self.files) < 200):
            picture, mode = _decoded(file)
            sizes[f"{picture.width}x{picture.height}"] += 1
            if mode != "RGB":
                modes[mode] += 1
        return {"sizes": dict(sorted(sizes.items()))} | ({"converted to RGB": dict(sorted(modes.items()))} if modes else {})


def open_image(file: Path) -> Image.Image:
    """An image as RGB. Raises InputError, which names it, if it is missing or damaged."""
    return _decoded(file)[0]


def _decoded(file: Path) -> tuple[Image.Image, str]:
    try:
        with Image.open(file) as picture:
            if picture.mode.startswith(("I", "F")):
                raise InputError(f"image {file} has more than 8 bits per channel ({picture.mode}): convert it first")
            return picture.convert("RGB"), picture.mode
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"image {file} is missing") from None
    except UnidentifiedImageError:
        raise InputError(f"image {file} is damaged, or not an image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"image {file} cannot be read: {error}") from error


def read_prompts(path: Path, limit: int | None = None) -> list[PromptRow]:
    """The rows of a prompt file, or of each file in a folder, whose name is then the style (as in HPSv2's benchmark).

    Columns are prompt, negative_prompt, seed, style and file. limit: at most so many, spread evenly. Raises InputError.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl", ".txt", ".csv", ".tsv"))
        rows = [row for file in files for row in _rows(file, file.stem)]
    else:
        rows = _rows(path, None)
    if not rows:
        raise InputError(f"{path} holds no prompt")
    return spread(rows, limit)


def _rows(path: Path, style: str | None) -> list[PromptRow]:
    rows = []
    with PromptFile(path, names=COLUMNS) as file:
        file.check()
        for place, record in file.records():
            where = f"{path}, {file.word} {place}"
            if not isinstance(record, dict):
                raise InputError(f"{where}: {record}")
            values = {name: value for name, value in record.items() if name in COLUMNS and value not in (None, "")}
            if style is not None:
                values.setdefault("style", style)
            try:
                if "seed" in values:
                    values["seed"] = int(values["seed"])
                if not all(isinstance(value, str) for name, value in values.items() if name != "seed"):
                    raise ValueError("text is expected in every column but seed")
                rows.append(PromptRow(**values))
            except (TypeError, ValueError) as error:
                raise InputError(f"{where}: {error}") from error
    return rows


def images_with_prompts(name: str, folder: Path, rows: Sequence[PromptRow], limit: int | None = None) -> ImageSet:
    """The images of another program: FOLDER/00000.png and so on, numbered from 0 or from 1, or as the column `file` says; if rows
    have styles and FOLDER their folders, FOLDER/STYLE/00000.jpg, numbered within each, as HPSv2 has them.

    rows: of all images; limit: takes at most so many of them, evenly, as read_prompts does. Raises InputError for a missing image, one
    that is there twice, and one without a prompt. Other folders are left alone and listed, images that no `file` names are counted.
    """
    check_folder(folder)
    if any(row.file for row in rows):
        unnamed = next((row.prompt for row in rows if not row.file), None)
        if unnamed is not None:
            raise InputError(f"prompt {unnamed!r} has no file, but others have")
        files = [_named(folder, str(row.file)) for row in rows]
        twice = next((file for file, times in Counter(files).items() if times > 1), None)
        if twice is not None:
            raise InputError(f"image {twice} is the file of two prompts")
        unused = len({file for place in {file.parent for file in files} for file in _images(place)} - set(files))
        facts: dict[str, Any] = {"images that no prompt names": unused} if unused else {}
        return ImageSet(name, tuple(spread(files, limit)), tuple(spread(rows, limit)), facts={"folder": folder.name, **facts})
    places: list[Path] = [folder] * len(rows)
    if all(row.style and (folder / row.style).is_dir() for row in rows):
        places = [folder / str(row.style) for row in rows]
    files, used = [Path()] * len(rows), set(places)
    for place in used:
        indices = [i for i, other in enumerate(places) if other == place]
        for i, file in zip(indices, _numbered(place, len(indices)), strict=True):
            files[i] = file
    ignored = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry not in used and not entry.name.startswith("."))
    facts = {"ignored folders": ignored} if ignored else {}
    return ImageSet(name, tuple(spread(files, limit)), tuple(spread(rows, limit)), facts={"folder": folder.name, **facts})


def _named(folder: Path, file: str) -> Path:
    """The image that a column `file` names. Raises InputError if it is missing or outside the folder."""
    path = Path(os.path.normpath(folder / file))
    if not path.is_relative_to(os.path.normpath(folder)):
        raise InputError(f"image {file!r} is outside {folder}")
    if not path.is_file():
        raise InputError(f"image {path} is missing")
    return path


def _images(folder: Path) -> list[Path]:
    """The images of a folder, by name."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))


def _numbered(folder: Path, count: int) -> list[Path]:
    """The images of a folder by their numbers, which are 0 to count - 1, or 1 to count."""
    by_number: dict[int, Path] = {}
    for file in _images(folder):
        if not re.fullmatch(r"\d+", file.stem):
            raise InputError(f"image {file} is not named by a number: a column `file` of the prompts says whose it is")
        number = int(file.stem)
        if number in by_number:
            raise InputError(f"image {number} of {folder} is there twice: {by_number[number].name} and {file.name}")
        by_number[number] = file
    first = 1 if 0 not in by_number and count in by_number else 0
    width = max((len(file.stem) for file in by_number.values()), default=5)
    for number in range(first, first + count):
        if number not in by_number:
            raise InputError(f"image {folder / f'{number:0{width}d}'}.* is missing: {count} prompts need {count} images")
    extra = next((file for number, file in by_number.items() if not first <= number < first + count), None)
    if extra is not None:
        raise InputError(f"image {extra} has no prompt: there are {count}")
    return [by_number[number] for number in range(first, first + count)]


def reference_images(folder: Path) -> ImageSet:
    """All images of a folder of real ones. Raises InputError if there is none."""
    files = tuple(_images(check_folder(folder)))
    if not files:
        raise InputError(f"folder {folder} holds no image ({', '.join(SUFFIXES)})")
    return ImageSet("reference", files, facts={"folder": folder.name})


def make_images(
    name: str, sampler: Sampler, rows: Sequence[PromptRow], folder: Path, seed: int = 0, scale: float | None = None
) -> ImageSet:
    """The sampler's images of the rows, in the folder; what an earlier run left there is kept. Row i has seed + i unless it has its own.

    Raises InputError if the folder holds images of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_remains(folder)
    seeds = tuple(seed + i if row.seed is None else row.seed for i, row in enumerate(rows))
    made_by = {"made by": sampler.facts, "seeds": list(seeds), "scale": scale, "rows": [asdict(row) for row in rows]}
    _claim(folder / _SET, made_by)
    files = tuple(folder / f"{i:05d}.png" for i in range(len(rows)))
    with tqdm(total=len(rows), desc=f"images of {name}", unit="image") as bar:
        for start in range(0, len(rows), BATCH):
            part = slice(start, start + BATCH)
            if not all(file.exists() for file in files[part]):
                few = rows[part]
                negatives = [row.negative_prompt for row in few]
                pictures = sampler([row.prompt for row in few], seeds[part], negatives if any(negatives) else None, scale)
                for file, picture in zip(files[part], pictures, strict=True):
                    write_whole(file, _png(picture))
            bar.update(len(files[part]))
    return ImageSet(name, files, tuple(rows), seeds, {**sampler.facts, **({} if scale is None else {"negative scale": scale})})


def _claim(path: Path, made_by: dict[str, Any]) -> None:
    """Writes down what a folder's images are made of, or finds the same there."""
    text = json.dumps(made_by, indent=1, sort_keys=True) + "\n"
    if not path.exists():
        if any(path.parent.iterdir()):
            raise InputError(f"folder {path.parent} holds other files: choose another --out")
        write_whole(path, text.encode())
    elif path.read_text(encoding="utf-8") != text:
        raise InputError(f"folder {path.parent} holds images of another model, other prompts or seeds: choose another --out, or remove it")


def _png(picture: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "png")
    return data.getvalue()
