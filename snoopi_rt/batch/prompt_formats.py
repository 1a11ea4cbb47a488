"""The records of prompt files, one at a time and in constant memory: text, CSV, TSV, JSON, JSON lines or Parquet."""

import codecs
import csv
import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import chain
from typing import Any, BinaryIO

from snoopi_rt.errors import InputError, PackageMissing, how_to_install
from snoopi_rt.json_reader import parse_json

MAX_LINE = 2**20
"""Bytes of a line, characters of an entry in a JSON list."""
NUMBERS = ("negative_scale", "seed")
"""The columns with numbers; the others contain text."""
DELIMITERS = ",;\t"
_UNNAMED = re.compile(r"column \d+")
"""A column with an empty header: it counts only if it has a value, because spreadsheets write empty columns at the end."""
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+("?)|[\[\]{},]', re.DOTALL)


class InvalidRow(str):
    """Why a row cannot be read."""


Record = tuple[int, dict[str, Any] | InvalidRow]
"""The line where a record begins, or its number if the format has no lines; its values by column, None for an empty cell."""


def records(file: BinaryIO, format: str, names: Collection[str]) -> Iterator[Record]:
    """The records of a file in one of FORMATS, without blank ones. From Parquet only the columns `names` are read.

    Raises InputError for a file that is not in that format; a record that cannot be read is an InvalidRow, and the rest is read.
    """
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    if format != "parquet" and start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError("it is UTF-16, which is not UTF-8 text")
    return FORMATS[format](file, names)


def detect_format(start: bytes) -> str:
    """The format of a file that begins with these bytes: text, unless it can only be something else."""
    if start.startswith(b"PAR1"):
        return "parquet"
    text = start.decode("utf-8-sig", "replace").lstrip()
    if re.match(r'\[\s*["{\]]', text):
        return "json"
    if re.match(r'\{\s*["}]', text):
        return "jsonl"
    first = text.partition("\n")[0]
    return "csv" if "prompt" in _cells(first, delimiter(first, ("prompt",))) else "txt"


def delimiter(header: str, names: Collection[str]) -> str:
    """The delimiter of a header: the one that yields most known names, and of those most cells."""

    def score(mark: str) -> tuple[int, int]:
        cells = _cells(header, mark)
        return len(set(cells) & set(names)), len(cells)

    return max(DELIMITERS, key=score)


def columns(file: BinaryIO, format: str) -> list[str]:
    """The columns that the file declares in a schema, which only Parquet does."""
    return list(_opened_parquet(file).schema_arrow.names) if format == "parquet" else []


def _lines(file: BinaryIO) -> Iterator[tuple[int, str | InvalidRow]]:
    """Every line that is not blank, stripped."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE)
            yield number, InvalidRow(f"longer than {MAX_LINE} bytes")
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            yield number, InvalidRow("not UTF-8 text")
            continue
        if text:
            yield number, text


def _text(file: BinaryIO, names: Collection[str]) -> Iterator[Record]:
    for number, line in _lines(file):
        if isinstance(line, InvalidRow):
            yield number, line
        elif not line.startswith("#"):
            yield number, {"prompt": line}


def _json_lines(file: BinaryIO, names: Collection[str]) -> Iterator[Record]:
    for number, line in _lines(file):
        yield number, line if isinstance(line, InvalidRow) else _object(line)


def _object(text: str) -> dict[str, Any] | InvalidRow:
    """The row in a JSON text: an object, or a string, which is a prompt."""
    try:
        value = parse_json(text, nan_is_null=True)
    except ValueError as error:
        return InvalidRow(f"not a JSON object: {text[:40]!r} ({error})")
    if isinstance(value, str):
        return {"prompt": value}
    return value if isinstance(value, dict) else InvalidRow(f"not a JSON object: {text[:40]!r}")


def _json_list(file: BinaryIO, names: Collection[str]) -> Iterator[Record]:
    """Splits a list into its entries before they are parsed, so that an invalid one affects no other and the file is never in memory."""
    reader = codecs.getreader("utf-8-sig")(file, "strict")
    buffer, place, number = "", 0, 0

    def more() -> bool:
        nonlocal buffer, place
        try:
            read = reader.read(max(2**16, len(buffer) - place))
        except UnicodeDecodeError as error:
            raise InputError("it is not UTF-8 text") from error
        buffer, place = buffer[place:] + read, 0
        return bool(read)

    def character() -> str:
        """The next character that is not white space; empty at the end of the file."""
        nonlocal place
        while True:
            while place < len(buffer) and buffer[place].isspace():
                place += 1
            if place < len(buffer) or not more():
                return buffer[place : place + 1]

    if character() != "[":
        raise InputError("it is not a list of objects or strings (for one object per line use .jsonl)")
    place += 1
    last = character() == "]"
    while not last:
        while (end := _end_of_entry(buffer, place)) is None:
            if len(buffer) - place > MAX_LINE:
                raise InputError(f"row {number + 1} has more than {MAX_LINE} characters, or what follows is not JSON")
            if not more():
                raise InputError("it ends in the middle of the list")
        number += 1
        yield number, _object(buffer[place:end].strip())
        last, place = buffer[end] == "]", end + (buffer[end] == ",")
    place += 1
    if character():
        raise InputError("something follows the list")


def _end_of_entry(text: str, start: int) -> int | None:
    """The position of the comma or bracket after a list's entry; None if it is not in the text yet."""
    depth = 0
    for match in _TOKEN.finditer(text, start):
        token = match[0]
        if token[0] == '"':
            if not match[1]:
                return None
        elif depth == 0 and token in ",]":
            return match.start()
        elif token != ",":
            depth += 1 if token in "[{" else -1
    return None


def _table(file: BinaryIO, names: Collection[str], mark: str | None = None) -> Iterator[Record]:
    lines = _table_lines(file)
    blank, first = 0, ""
    for first in lines:
        if first.strip():
            break
        blank += 1
    reader = csv.reader(chain([first], lines), delimiter=mark or delimiter(first, names), strict=True, skipinitialspace=True)
    begin = blank + 1
    try:
        header = [cell.strip() or (f"column {place}" if place > 1 else "") for place, cell in enumerate(next(reader, []), 1)]
        check_columns(header)
        begin = blank + reader.line_num + 1
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield begin, _row(header, cells)
            begin = blank + reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"line {begin} is not CSV ({error}): is a quotation mark missing?") from error


def _table_lines(file: BinaryIO) -> Iterator[str]:
    """The lines with their line ends, since a quoted cell may contain some; invalid UTF-8 becomes surrogates, which `_row` detects."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise InputError(f"line {number} is longer than {MAX_LINE} bytes")
        yield line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")


def _row(header: list[str], cells: list[str]) -> dict[str, Any] | InvalidRow:
    if any(cell.strip() for cell in cells[len(header) :]):
        return InvalidRow("more cells than columns")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return InvalidRow("not UTF-8 text")
    values: dict[str, Any] = dict.fromkeys(name for name in header if not _UNNAMED.fullmatch(name))
    return values | {name: cell for name, cell in zip(header, cells, strict=False) if cell.strip()}


def _cells(line: str, mark: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=mark, skipinitialspace=True), [])]
    except csv.Error:
        return []


def check_columns(header: list[str]) -> None:
    """Raises InputError if two columns have the same name."""
    if duplicates := [name for name in header if name and header.count(name) > 1]:
        raise InputError(f"its column {duplicates[0]!r} appears twice")


def _parquet(file: BinaryIO, names: Collection[str]) -> Iterator[Record]:
    opened = _opened_parquet(file)
    selected = [name for name in opened.schema_arrow.names if name in names]
    for name in selected:
        _check_type(name, opened.schema_arrow.field(name).type)
    number = 0
    try:
        for part in opened.iter_batches(1024, columns=selected):
            for row in part.to_pylist():
                number += 1
                yield number, row
    except InputError:
        raise
    except Exception as error:  # pyarrow raises errors of any kind for damaged files
        raise InputError("it is not a valid Parquet file") from error


def _opened_parquet(file: BinaryIO) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise PackageMissing(f"Parquet needs pyarrow: {how_to_install('parquet')}") from error
    try:
        opened = parquet.ParquetFile(file)
        header = list(opened.schema_arrow.names)
    except Exception as error:
        raise InputError("it is not a valid Parquet file") from error
    check_columns(header)
    return opened


def _check_type(name: str, type: Any) -> None:
    """Raises InputError for a column whose type is neither text nor numbers, whichever it needs."""
    from pyarrow import types

    value = type.value_type if types.is_dictionary(type) else type
    if name in NUMBERS:
        fits = types.is_integer(value) or types.is_floating(value) or types.is_decimal(value)
    else:
        fits = types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)
    if not fits and not types.is_null(value):
        raise InputError(f"its column {name!r} contains {type}, not {'numbers' if name in NUMBERS else 'text'}")


FORMATS: dict[str, Callable[[BinaryIO, Collection[str]], Iterator[Record]]] = {
    "txt": _text,
    "csv": _table,
    "tsv": partial(_table, mark="\t"),
    "json": _json_list,
    "jsonl": _json_lines,
    "parquet": _parquet,
}
