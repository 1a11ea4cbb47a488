"""The one reader of untrusted JSON and numbers: bounded in size, depth and range, from regular files only."""

import json
import math
import re
from pathlib import Path
from typing import Any

from snoopi_rt.files import read_bounded

MAX_DEPTH = 32
"""How deep lists and objects may be nested: bundle.json, the deepest document, needs 7."""
MAX_DIGITS = 40
"""Digits of an integer: far more than needed, far fewer than take long to convert or print."""
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


def parse_json(data: bytes | str, nan_is_null: bool = False, infinity: bool = False) -> Any:
    """The value of a JSON text. `nan_is_null`: NaN, which is not JSON but pandas writes it, counts as null; `infinity` allows it.

    Raises ValueError, in one line, for invalid JSON or UTF-8, a duplicate key, a nesting beyond MAX_DEPTH, a number beyond
    MAX_DIGITS or a float's range, NaN, infinity, and text that is not Unicode.
    """

    def constant(name: str) -> float | None:
        if infinity and name != "NaN":
            return float(name)
        if name != "NaN" or not nan_is_null:
            raise ValueError(f"{name} is not a number")
        return None

    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        document = json.loads(
            text, parse_int=parse_integer, parse_float=_real, parse_constant=constant, object_pairs_hook=_without_duplicates
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check(document)
    return document


def read_json(path: Path, limit: int) -> Any:
    """The value in a JSON file of at most `limit` bytes. Raises OSError as `read_bounded` does, ValueError as `parse_json` does."""
    return parse_json(read_bounded(path, limit))


def parse_number(text: str) -> int | float | None:
    """The number in a text, None for NaN. Raises ValueError for anything else, and for infinity."""
    text = text.strip()
    if text.lower() == "nan":
        return None
    if _NUMBER.fullmatch(text) is None:
        raise ValueError(f"{text[:40]!r} is not a number")
    return parse_integer(text) if text.lstrip("+-").isdigit() else _real(text)


def parse_integer(text: str) -> int:
    """The integer in a text. Raises ValueError for more than MAX_DIGITS digits."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"the number {text[:10]}... has {len(text)} digits, at most {MAX_DIGITS} are read")
    return int(text)


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key {duplicate[:40]!r}")
    return document


def _check(document: Any) -> None:
    """Raises ValueError for values nested too deep, and for text that is not Unicode. Without recursion, against which it guards."""
    level: list[Any] = [document]
    for depth in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict | list):
                if depth == MAX_DEPTH:
                    raise ValueError(_TOO_DEEP)
                below += [*value, *value.values()] if isinstance(value, dict) else value
            elif isinstance(value, str):
                try:
                    value.encode()
                except UnicodeEncodeError:
                    raise ValueError("half of a surrogate pair, which is not Unicode text") from None
        level = below


_TOO_DEEP = f"nested more than {MAX_DEPTH} deep"
