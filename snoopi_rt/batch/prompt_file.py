"""The one reader of prompt files, for every command: what may be in them, and the rows as jobs of `Pipeline.generate`."""

import hashlib
import io
import math
import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from snoopi_rt.batch.prompt_formats import KINDS, NUMBERS, Record, Wrong, columns, guess, records
from snoopi_rt.errors import EngineMissing, InputError
from snoopi_rt.files import open_regular, reason
from snoopi_rt.json_reader import parse_number
from snoopi_rt.request import FIELDS, prompt_text

STANDARD_INPUT = Path("-")
LARGEST_INPUT = 2**30
"""Bytes of standard input, which are kept in a temporary file meanwhile: a batch reads its rows more than once."""
_INDEX = re.compile(r"Unnamed: \d+(\.\d+)*|__index_level_\d+__")
"""The columns that pandas makes of an index; the first one without a name is one, too."""


class Row(NamedTuple):
    """number: from 1, of rows; blank lines and comments are none. place: where the row is, for people. job: or what is wrong with it."""

    number: int
    place: str
    job: dict[str, Any] | Wrong


class Contents(NamedTuple):
    """How many rows a file has, and whether one of them has a negative prompt."""

    rows: int
    negative: bool


class PromptFile:
    """A .txt, .csv, .tsv, .json, .jsonl or .parquet file, or standard input for "-", open until `close`.

    kind: the format, by its ending without the dot; None takes the file's own, in any case, and of standard input what it looks like.
    ignore_columns: skip those that are not among `names`.
    Raises InputError for a file that is no regular one, cannot be read, or whose kind is unknown.
    """

    def __init__(self, path: Path, kind: str | None = None, ignore_columns: bool = False, names: Collection[str] = FIELDS) -> None:
        self.path, self._ignore_columns, self._names = path, ignore_columns, names
        self._contents: Contents | None = None
        if kind is not None and kind not in KINDS:
            raise InputError(f"unknown format {kind!r} of prompts, choose from {', '.join(KINDS)}")
        with self._errors():
            self._file = _spooled() if path == STANDARD_INPUT else open_regular(path)
        try:
            with self._errors():
                self.kind = kind or self._own_kind()
                self._stamp, self.sha256 = self._stamped(), self._digest()
        except BaseException:
            self._file.close()
            raise

    @property
    def name(self) -> str:
        """What the file is called in errors."""
        return "standard input" if self.path == STANDARD_INPUT else str(self.path)

    @property
    def word(self) -> str:
        """What a record's place is called."""
        return "row" if self.kind in ("json", "parquet") else "line"

    def judge(self) -> Contents:
        """What is in the file, judged as a whole before anything is drawn.

        Raises InputError for unknown columns, unless they are to be ignored, for none of prompts, and where there is no row.
        """
        if self._contents is not None:
            return self._contents
        with self._errors():
            seen, count, negative = dict.fromkeys(columns(self._file, self.kind)), 0, False
        wrong: list[str] = []
        for place, record in self.records():
            count += 1
            if isinstance(record, dict):
                seen.update(dict.fromkeys(record))
                negative = negative or _is_text(record.get("negative_prompt"))
            elif not wrong:
                wrong = [f"{self.word} {place}: {record}"]
        if not seen:
            raise InputError(": ".join([f"{self.name} holds no prompt", *wrong]))
        # The order of the columns is that of their first appearance: only the very first may go without a name.
        unknown = [name for place, name in enumerate(seen) if name not in self._names and not _is_index(place, name)]
        known = ", ".join(self._names)
        if "prompt" not in seen:
            raise InputError(f"{self.name} has no column 'prompt' but {', '.join(map(repr, list(seen)[:10]))}: known are {known}")
        if unknown and not self._ignore_columns:
            raise InputError(f"{self.name} has the unknown column {unknown[0]!r}: known are {known}; --ignore-columns skips others")
        self._contents = Contents(count, negative)
        return self._contents

    def rows(self) -> Iterator[Row]:
        """The rows in order, without what was not given. Raises InputError as `judge` and `records` do."""
        self.judge()
        for number, (place, record) in enumerate(self.records(), 1):
            yield Row(number, f"{self.word} {place}", record if isinstance(record, Wrong) else _job(record, self.kind in ("csv", "tsv")))

    def records(self) -> Iterator[Record]:
        """The rows as they are in the file. Raises InputError where it is not what its kind promises, or is changed meanwhile."""
        with self._errors():
            for record in records(self._file, self.kind, self._names):
                self._check_unchanged()
                yield record

    def _own_kind(self) -> str:
        if self.path == STANDARD_INPUT:
            return guess(self._file.read(2**16))
        kind = self.path.suffix.lower().removeprefix(".")
        if kind not in KINDS:
            raise InputError(f"it is not one of {', '.join(f'.{each}' for each in KINDS)}: --prompts-format says which")
        return kind

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check_unchanged(self) -> None:
        stamp = self._stamped()
        if stamp != self._stamp:
            place = self._file.tell()
            if self._digest() != self.sha256:
                raise InputError("it was changed while it was read: start again")
            self._file.seek(place)
            self._stamp = stamp

    def _stamped(self) -> tuple[int, int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _digest(self) -> str:
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Names the file in every error."""
        try:
            yield
        except EngineMissing as error:
            raise EngineMissing(f"{self.name}: {error}") from error
        except InputError as error:
            raise InputError(f"cannot read {self.name}: {error}") from error
        except OSError as error:
            hint = f" (what comes through a pipe is read from standard input: - < {self.path})" if self._is_pipe() else ""
            raise InputError(f"cannot read {self.name}: {reason(error)}{hint}") from error

    def _is_pipe(self) -> bool:
        try:
            return self.path.is_fifo()
        except OSError:
            return False


def texts_of(job: dict[str, Any] | Wrong) -> list[str]:
    """The prompt of a row and its negative prompt, if it has one. Raises InputError for a row that is wrong."""
    if isinstance(job, Wrong):
        raise InputError(job)
    negative = job.get("negative_prompt", "")
    return [prompt_text(text) for text in ([job["prompt"], negative] if _is_text(negative) else [job["prompt"]])]


def _spooled() -> io.BufferedReader:
    """What standard input has, as a file. Raises InputError and OSError."""
    if sys.stdin is None:
        raise InputError("there is no standard input")
    file: Any = tempfile.TemporaryFile()  # noqa: SIM115 (the PromptFile closes it)
    try:
        while part := sys.stdin.buffer.read(io.DEFAULT_BUFFER_SIZE):
            file.write(part)
            if file.tell() > LARGEST_INPUT:
                raise InputError(f"it has more than {LARGEST_INPUT} bytes")
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _is_text(value: Any) -> bool:
    """Whether it says something: blank text is none."""
    return isinstance(value, str) and value.strip() != ""


def _is_index(place: int, name: str) -> bool:
    return _INDEX.fullmatch(name) is not None or (place == 0 and not name)


def _job(record: dict[str, Any], cells: bool) -> dict[str, Any] | Wrong:
    """What a record says of a request, without what is null or NaN: that was not given. `cells`: all values are text."""
    job = {}
    for name in FIELDS:
        value = record.get(name)
        if name in NUMBERS:
            value = _number(name, value, cells)
        if value is not None:
            job[name] = value
    return job if "prompt" in job else Wrong("no prompt")


def _number(name: str, value: Any, cell: bool) -> Any:
    """The number that is meant, None for NaN; what is none stays as it is, and `generate` says so."""
    if cell and isinstance(value, str):
        # Where spreadsheets separate cells by semicolons they write 0,5 and 7,0; but 1,000 may be a thousand.
        decimal = value.count(",") == 1 if name == "negative_scale" else re.fullmatch(r"\s*\d+,0\s*", value)
        text = value.replace(",", ".") if decimal else value
        with suppress(ValueError):
            value = parse_number(text)
    if isinstance(value, Decimal) or (isinstance(value, Real) and not isinstance(value, int)):
        value = None if math.isnan(value) else float(value)
    whole = name == "seed" and isinstance(value, float) and value.is_integer()
    return int(value) if whole else value
