"""The one reader of prompt files, for every command: validation, and the rows as keyword arguments of a request."""

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

from snoopi_rt.batch.prompt_formats import FORMATS, NUMBERS, InvalidRow, Record, columns, detect_format, records
from snoopi_rt.errors import InputError, PackageMissing
from snoopi_rt.files import open_regular, reason
from snoopi_rt.json_reader import parse_number
from snoopi_rt.request import FIELDS, prompt_text

STANDARD_INPUT = Path("-")
MAX_INPUT = 2**30
"""Bytes of standard input, which is copied to a temporary file because a batch reads its rows more than once."""
_INDEX = re.compile(r"Unnamed: \d+(\.\d+)*|__index_level_\d+__")
"""The columns that pandas writes for an index; so is a first column without a name."""


class Row(NamedTuple):
    """A row of a prompt file."""

    number: int
    """From 1; blank lines and comments do not count."""
    place: str
    """For people, such as "line 3"."""
    fields: dict[str, Any] | InvalidRow
    """Request fields by name, or why the row cannot be read."""


class Summary(NamedTuple):
    """The number of rows, and whether any has a negative prompt."""

    rows: int
    negative: bool


class PromptFile:
    """A .txt, .csv, .tsv, .json, .jsonl or .parquet file, or standard input for "-", open until `close`.

    format: a file ending without the dot; by default the file's own, in any case, and for standard input it is detected.
    ignore_columns: skip columns that are not among `names`.
    Raises InputError for a file that is not regular, cannot be read, or has an unknown format.
    """

    def __init__(self, path: Path, format: str | None = None, ignore_columns: bool = False, names: Collection[str] = FIELDS) -> None:
        self.path, self._ignore_columns, self._names = path, ignore_columns, names
        self._summary: Summary | None = None
        if format is not None and format not in FORMATS:
            raise InputError(f"unknown prompt format {format!r}, choose from {', '.join(FORMATS)}")
        with self._errors():
            self._file = _spooled() if path == STANDARD_INPUT else open_regular(path)
        try:
            with self._errors():
                self.format = format or self._own_format()
                self._stamp, self.sha256 = self._stamped(), self._digest()
        except BaseException:
            self._file.close()
            raise

    @property
    def name(self) -> str:
        """The file's name in errors."""
        return "standard input" if self.path == STANDARD_INPUT else str(self.path)

    @property
    def word(self) -> str:
        """What its records are called in errors: lines or rows."""
        return "row" if self.format in ("json", "parquet") else "line"

    def check(self) -> Summary:
        """A summary of the file, which is validated as a whole before anything is drawn.

        Raises InputError for unknown columns, unless they are ignored, for a file without a column of prompts, and for one without rows.
        """
        if self._summary is not None:
            return self._summary
        with self._errors():
            seen, count, negative = dict.fromkeys(columns(self._file, self.format)), 0, False
        invalid: list[str] = []
        for place, record in self.records():
            count += 1
            if isinstance(record, dict):
                seen.update(dict.fromkeys(record))
                negative = negative or _is_text(record.get("negative_prompt"))
            elif not invalid:
                invalid = [f"{self.word} {place}: {record}"]
        if not seen:
            raise InputError(": ".join([f"{self.name} contains no prompt", *invalid]))
        # In order of first appearance: only the very first column may have no name.
        unknown = [name for place, name in enumerate(seen) if name not in self._names and not _is_index(place, name)]
        known = ", ".join(self._names)
        if "prompt" not in seen:
            raise InputError(f"{self.name} has no column 'prompt' but {', '.join(map(repr, list(seen)[:10]))}: expected {known}")
        if unknown and not self._ignore_columns:
            remedy = "; --ignore-columns skips others" if self._names == FIELDS else ""
            raise InputError(f"{self.name} has the unknown column {unknown[0]!r}: expected {known}{remedy}")
        self._summary = Summary(count, negative)
        return self._summary

    def rows(self) -> Iterator[Row]:
        """The rows in order; null and empty fields are left out. Raises InputError as `check` and `records` do."""
        self.check()
        for number, (place, record) in enumerate(self.records(), 1):
            fields = record if isinstance(record, InvalidRow) else _fields(record, self.format in ("csv", "tsv"))
            yield Row(number, f"{self.word} {place}", fields)

    def records(self) -> Iterator[Record]:
        """The rows as they are in the file. Raises InputError if it is not in its format, or changes while it is read."""
        with self._errors():
            for record in records(self._file, self.format, self._names):
                self._check_unchanged()
                yield record

    def _own_format(self) -> str:
        if self.path == STANDARD_INPUT:
            return detect_format(self._file.read(2**16))
        format = self.path.suffix.lower().removeprefix(".")
        if format not in FORMATS:
            raise InputError(f"it is not one of {', '.join(f'.{name}' for name in FORMATS)}: give --prompts-format")
        return format

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check_unchanged(self) -> None:
        stamp = self._stamped()
        if stamp != self._stamp:
            place = self._file.tell()
            if self._digest() != self.sha256:
                raise InputError("it changed while it was read: start again")
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
        """Adds the file's name to every error."""
        try:
            yield
        except PackageMissing as error:
            raise PackageMissing(f"{self.name}: {error}") from error
        except InputError as error:
            raise InputError(f"cannot read {self.name}: {error}") from error
        except OSError as error:
            hint = f" (read a pipe from standard input: - < {self.path})" if self._is_pipe() else ""
            raise InputError(f"cannot read {self.name}: {reason(error)}{hint}") from error

    def _is_pipe(self) -> bool:
        try:
            return self.path.is_fifo()
        except OSError:
            return False


def texts_of(fields: dict[str, Any] | InvalidRow) -> list[str]:
    """The prompt of a row, and its negative prompt if it has one. Raises InputError for an invalid row."""
    if isinstance(fields, InvalidRow):
        raise InputError(fields)
    negative = fields.get("negative_prompt", "")
    return [prompt_text(text) for text in ([fields["prompt"], negative] if _is_text(negative) else [fields["prompt"]])]


def _spooled() -> io.BufferedReader:
    """Standard input, copied to a temporary file. Raises InputError and OSError."""
    if sys.stdin is None:
        raise InputError("there is no standard input")
    file: Any = tempfile.TemporaryFile()  # noqa: SIM115 (the PromptFile closes it)
    try:
        while part := sys.stdin.buffer.read(io.DEFAULT_BUFFER_SIZE):
            file.write(part)
            if file.tell() > MAX_INPUT:
                raise InputError(f"it has more than {MAX_INPUT} bytes")
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _is_text(value: Any) -> bool:
    """Whether it is text that is not blank."""
    return isinstance(value, str) and value.strip() != ""


def _is_index(place: int, name: str) -> bool:
    return _INDEX.fullmatch(name) is not None or (place == 0 and not name)


def _fields(record: dict[str, Any], cells: bool) -> dict[str, Any] | InvalidRow:
    """A record's request fields; null and NaN count as not given. `cells`: all values are text."""
    fields = {}
    for name in FIELDS:
        value = record.get(name)
        if name in NUMBERS:
            value = _number(name, value, cells)
        if value is not None:
            fields[name] = value
    return fields if "prompt" in fields else InvalidRow("no prompt")


def _number(name: str, value: Any, cell: bool) -> Any:
    """The value as a number, None for NaN; anything else is returned as it is, for `generate` to refuse."""
    if cell and isinstance(value, str):
        # Spreadsheets that separate cells by semicolons write 0,5 and 7,0; but 1,000 may be a thousand.
        decimal = value.count(",") == 1 if name == "negative_scale" else re.fullmatch(r"\s*\d+,0\s*", value)
        text = value.replace(",", ".") if decimal else value
        with suppress(ValueError):
            value = parse_number(text)
    if isinstance(value, Decimal) or (isinstance(value, Real) and not isinstance(value, int)):
        value = None if math.isnan(value) else float(value)
    whole = name == "seed" and isinstance(value, float) and value.is_integer()
    return int(value) if whole else value
