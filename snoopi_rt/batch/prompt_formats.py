"""The records of a file of prompts, one at a time and in constant memory: text, CSV, TSV, JSON, JSON lines or Parquet."""

import codecs
import csv
import re
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from typing import Any, BinaryIO

from snoopi_rt.errors import EngineMissing, InputError, how_to_install
from snoopi_rt.json_reader import parse_json

LONGEST = 2**20
"""Bytes of a line, characters of an entry of a JSON list."""
NUMBERS = ("negative_scale", "seed")
"""The columns that hold numbers; the others hold text."""
DELIMITERS = ",;\t"
_UNNAMED = re.compile(r"column \d+")
"""A column whose header is empty: it is there where it has a value, since spreadsheets write empty columns at the end."""
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+("?)|[\[\]{},]', re.DOTALL)


class Wrong(str):
    """What is wrong with one row."""


Record = tuple[int, dict[str, Any] | Wrong]
"""The line where a record begins, or its number where the format has no lines; its values by column, None where a cell is empty."""


def records(file: BinaryIO, kind: str, names: Collection[str]) -> Iterator[Record]:
    """The records of a file of one of KINDS, without blank ones. Of Parquet only the columns `names` are read.

    Raises InputError for a file that is not of that kind; a record that cannot be read is Wrong, and the rest is read.
    """
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    if kind != "parquet" and start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError("it is UTF-16, which is not UTF-8 text")
    return KINDS[kind](file, names)


def guess(start: bytes) -> str:
    """The kind of a file that begins so: text, unless it can only be something else."""
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
    """What separates the names in a header: that which makes most of them known, else most cells."""

    def known(mark: str) -> tuple[int, int]:
        cells = _cells(header, mark)
        return len(set(cells) & set(names)), len(cells)

    return max(DELIMITERS, key=known)


def columns(file: BinaryIO, kind: str) -> list[str]:
    """The columns that the file names apart from its records: Parquet's."""
    return list(_opened_parquet(file).schema_arrow.names) if kind == "parquet" else []


def _lines(file: BinaryIO) -> Iterator[tuple[int, str | Wrong]]:
    """Every line that is not blank, without white space around it."""
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            while line and not line.endswith(b"\n"):
                line = file.readline(LONGEST)
            yield number, Wrong(f"longer than {LONGEST} bytes")
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            yield number, Wrong("not UTF-8 text")
            continue
        if text:
            yield number, text


def _text(file: BinaryIO, names: Collection[str]) -> Iterator[Record]:
    for number, line in _lines(file):
        if isinstance(line, Wrong):
            yield number, line
        elif not line.startswith("#"):
            yield number, {"prompt": line}


def _json_lines(file: BinaryIO, names: Collection[str]) -> Iterator[Record]:
    for number, line in _lines(file):
        yield number, line if isinstance(line, Wrong) else _object(line)


def _object(text: str) -> dict[str, Any] | Wrong:
    """What an object says; a string is a prompt."""
    try:
        value = parse_json(text, nan_is_null=True)
    except ValueError as error:
        return Wrong(f"not a JSON object: {text[:40]!r} ({error})")
    if isinstance(value, str):
        return {"prompt": value}
    return value if isinstance(value, dict) else Wrong(f"not a JSON object: {text[:40]!r}")


def _json_list(file: BinaryIO, names: Collection[str]) -> Iterator[Record]:
    """Reads a list whose entries are taken apart before they are parsed: one that is odd costs itself, and the file is never in memory."""
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
        """The next one that is not white space; none at the end of the file."""
        nonlocal place
        while True:
            while place < len(buffer) and buffer[place].isspace():
                place += 1
            if place < len(buffer) or not more():
                return buffer[place : place + 1]

    if character() != "[":
        raise InputError("it is not a list of objects or strings (one object a line is what .jsonl is for)")
    place += 1
    last = character() == "]"
    while not last:
        while (end := _end_of_entry(buffer, place)) is None:
            if len(buffer) - place > LONGEST:
                raise InputError(f"row {number + 1} has more than {LONGEST} characters, or what follows is not JSON")
            if not more():
                raise InputError("it ends in the middle of its list")
        number += 1
        yield number, _object(buffer[place:end].strip())
        last, place = buffer[end] == "]", end + (buffer[end] == ",")
    place += 1
    if character():
        raise InputError("something follows its list")


def _end_of_entry(text: str, start: int) -> int | None:
    """Where the comma or bracket behind a list's entry is; None where it is not in the text yet."""
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
    """The lines with their ends, since a quoted cell may have some; bytes that are not UTF-8 are surrogates, which `_row` finds."""
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise InputError(f"line {number} is longer than {LONGEST} bytes")
        yield line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")


def _row(header: list[str], cells: list[str]) -> dict[str, Any] | Wrong:
    if any(cell.strip() for cell in cells[len(header) :]):
        return Wrong("more cells than the header has")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return Wrong("not UTF-8 text")
    values: dict[str, Any] = dict.fromkeys(name for name in header if not _UNNAMED.fullmatch(name))
    return values | {name: cell for name, cell in zip(header, cells, strict=False) if cell.strip()}


def _cells(line: str, mark: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=mark, skipinitialspace=True), [])]
    except csv.Error:
        return []


def check_columns(header: list[str]) -> None:
    """Raises InputError where two columns have one name."""
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise InputError(f"its column {twice[0]!r} is there twice")


def _parquet(file: BinaryIO, names: Collection[str]) -> Iterator[Record]:
    opened = _opened_parquet(file)
    wanted = [name for name in opened.schema_arrow.names if name in names]
    for name in wanted:
        _check_type(name, opened.schema_arrow.field(name).type)
    number = 0
    try:
        for part in opened.iter_batches(1024, columns=wanted):
            for row in part.to_pylist():
                number += 1
                yield number, row
    except InputError:
        raise
    except Exception as error:  # of a package in C++, whose errors on damaged files are of any kind
        raise InputError("it is not a whole Parquet file") from error


def _opened_parquet(file: BinaryIO) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise EngineMissing(f"Parquet needs pyarrow: {how_to_install('parquet')}") from error
    try:
        opened = parquet.ParquetFile(file)
        header = list(opened.schema_arrow.names)
    except Exception as error:
        raise InputError("it is not a whole Parquet file") from error
    check_columns(header)
    return opened


def _check_type(name: str, kind: Any) -> None:
    """Raises InputError for a column of what can be no text, or no number, such as times."""
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) else kind
    if name in NUMBERS:
        fits = types.is_integer(value) or types.is_floating(value) or types.is_decimal(value)
    else:
        fits = types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)
    if not fits and not types.is_null(value):
        raise InputError(f"its column {name!r} holds {kind}, not {'numbers' if name in NUMBERS else 'text'}")


def _tabs(file: BinaryIO, names: Collection[str]) -> Iterator[Record]:
    return _table(file, names, "\t")


KINDS: dict[str, Callable[[BinaryIO, Collection[str]], Iterator[Record]]] = {
    "txt": _text,
    "csv": _table,
    "tsv": _tabs,
    "json": _json_list,
    "jsonl": _json_lines,
    "parquet": _parquet,
}
