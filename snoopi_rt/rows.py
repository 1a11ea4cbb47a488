"""The rows of a file of prompts, one at a time: text, JSON lines, CSV or Parquet."""

import csv
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from snoopi_rt.engines.base import EngineMissing, InputError
from snoopi_rt.pipeline import JOB

KINDS = (".txt", ".jsonl", ".csv", ".parquet")
Row = tuple[int, dict[str, Any] | str]
"""A row's number, from 1, and its job, or what is wrong with it."""


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a .txt (a prompt a line), .jsonl, .csv or .parquet file with prompt, negative_prompt, negative_scale and seed by name.

    Blank lines are no rows. Raises InputError for a file of another kind and one that cannot be read.
    """
    readers = {".txt": _lines, ".jsonl": _objects, ".csv": _records, ".parquet": _columns}
    if path.suffix not in readers:
        raise InputError(f"{path} is not one of {', '.join(KINDS)}")
    try:
        yield from enumerate(readers[path.suffix](path), 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except csv.Error as error:
        raise InputError(f"{path} is not CSV: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text") from error


def _lines(path: Path) -> Iterator[dict[str, Any] | str]:
    with open(path, encoding="utf-8-sig") as file:
        yield from ({"prompt": line.strip()} for line in file if line.strip())


def _objects(path: Path) -> Iterator[dict[str, Any] | str]:
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                found: Any = None
                with suppress(ValueError, RecursionError):
                    found = json.loads(line)
                yield _job(_said(found)) if isinstance(found, dict) else f"not a JSON object: {line.strip()[:40]}"


def _records(path: Path) -> Iterator[dict[str, Any] | str]:
    """CSV knows text only; an empty cell is one that was not given."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        for record in csv.DictReader(file, restkey="more cells than the header has"):
            given = _said({name: value or None for name, value in record.items()})
            for name, kind in (("negative_scale", float), ("seed", int)):
                with suppress(ValueError):
                    given = {**given, name: kind(given[name])} if name in given else given
            yield _job(given)


def _columns(path: Path) -> Iterator[dict[str, Any] | str]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise EngineMissing(f'{path} needs pyarrow: pip install "snoopi-rt[parquet]"') from error
    try:
        file = parquet.ParquetFile(path)
        for part in file.iter_batches(1024, columns=[name for name in file.schema_arrow.names if name in JOB]):
            yield from (_job(_said(row)) for row in part.to_pylist())
    except ArrowInvalid as error:
        raise InputError(f"{path} is not a whole Parquet file") from error


def _said(given: dict[str, Any]) -> dict[str, Any]:
    """Without what is null: that is not said."""
    return {name: value for name, value in given.items() if value is not None}


def _job(given: dict[str, Any]) -> dict[str, Any] | str:
    if unknown := set(given) - set(JOB):
        return f"unknown {min(unknown)!r}, choose from {', '.join(JOB)}"
    return given if "prompt" in given else "no prompt"
