"""What became of each row of a batch: a file in its folder with a line for each, which outlives kills and damage."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from snoopi_rt import image
from snoopi_rt.batch.prompt_formats import MAX_LINE
from snoopi_rt.errors import InputError, OutputError
from snoopi_rt.files import open_regular, reason
from snoopi_rt.json_reader import parse_json
from snoopi_rt.request import FIELDS, Request

INDEX = "index.jsonl"


class Index:
    """One line of JSON per row; the first says what batch it is. A line that a kill cut short is written again.

    damaged: the rows whose images were listed and are not whole.
    """

    def __init__(self, path: Path, identity: dict[str, Any], image_path: Callable[[int], Path]) -> None:
        self._path, self._identity, self._image_path = path, identity, image_path
        self._known: set[int] = set()
        self.damaged: set[int] = set()

    def __enter__(self) -> Self:
        beside = self._path.with_name(f".{self._path.name}.part")
        try:
            beside.unlink(missing_ok=True)  # of a run that was killed
            with open(beside, "xb") as file:
                file.write(json.dumps(self._identity).encode() + b"\n")
                for line in self._still_right():
                    file.write(line)
            os.replace(beside, self._path)
            self._file = open(self._path, "ab", buffering=0)
        except OSError as error:
            raise OutputError(f"cannot write {self._path}: {reason(error)}") from error
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def holds(self, number: int, request: Request) -> bool:
        """Whether the row's image, of this very request, was listed and whole when the batch began."""
        return _key(number, vars(request)) in self._known

    def add(self, number: int, record: dict[str, Any]) -> None:
        """Writes one row's line."""
        line = json.dumps({"row": number, **record}).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise OutputError(f"cannot write {self._path}: {reason(error)}") from error
        if written != len(line):
            raise OutputError(f"cannot write {self._path}: the disk is full")

    def drawn(self, number: int, size: int, metadata: dict[str, str], warning: str = "") -> None:
        """Writes the line of an image of so many bytes, of the metadata that is in it."""
        numbers = {name: kind(metadata[name]) for name, kind in (("negative_scale", float), ("seed", int)) if name in metadata}
        texts = {name: metadata[name] for name in FIELDS if name in metadata}
        warned = {"warning": warning} if warning else {}
        self.add(number, {"file": self._image_path(number).name, "bytes": size, **texts, **numbers, **warned})

    def _still_right(self) -> Iterator[bytes]:
        """The lines of images that are there and whole. What failed, is damaged or is not there any more is drawn again."""
        if not self._path.is_file() or self._path.stat().st_size == 0:  # a power cut may leave its name alone
            return
        with open_regular(self._path) as file:
            first = _record(file.readline(MAX_LINE))
            if "batch" not in first:
                raise InputError(f"{self._path} is not an index of snoopi-rt")
            if first != json.loads(json.dumps(self._identity)):
                raise InputError(f"{self._path.parent} holds another batch (other prompts, bundle or settings): choose another folder")
            while line := file.readline(MAX_LINE):
                record = _record(line)
                row = record.get("row")
                if type(row) is not int or record.get("file") != self._image_path(row).name:
                    continue
                condition = image.condition(self._image_path(row), record.get("bytes"))
                if condition == "whole":
                    self._known.add(_key(row, record))
                    yield line
                elif condition == "damaged":
                    self.damaged.add(row)


def _record(line: bytes) -> dict[str, Any]:
    """What a whole line says; nothing if it was cut short or damaged."""
    with suppress(ValueError):
        record = parse_json(line)
        if isinstance(record, dict) and line.endswith(b"\n"):
            return record
    return {}


def _key(number: int, job: Mapping[str, Any]) -> int:
    """What tells a row's job from every other, in few bytes: an index may have millions of lines."""
    scale = job.get("negative_scale")
    scale = float(scale) if isinstance(scale, int | float) else scale
    return hash(json.dumps([number, job.get("prompt"), job.get("negative_prompt"), scale, job.get("seed")]))
