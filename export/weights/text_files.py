"""The small files beside weights (configs, indexes, tokenizers), checked as weights are: every error names the file and its defect."""

from pathlib import Path
from typing import Any

from snoopi_rt import json_reader
from snoopi_rt.errors import InputError
from snoopi_rt.files import is_lfs_pointer, read_bounded, reason

MAX_BYTES = 2**26
"""Of such a file: tokenizers have up to 20 MB, the index of a large checkpoint 2 MB."""


def check_file(path: Path) -> Path:
    """The path of a readable file that is not empty, else raises InputError, also for a git-lfs pointer."""
    try:
        if is_lfs_pointer(path):
            raise InputError(f"{path} is a git-lfs pointer and not the file itself: run `git lfs pull` in its clone, or fetch it again")
        if not path.stat().st_size:
            raise InputError(f"{path} is empty: fetch it again")
    except FileNotFoundError:
        raise InputError(f"no {path.name} in {path.parent}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error
    return path


def read_text(path: Path) -> str:
    """A file's text, which is UTF-8 whatever the locale. Raises InputError."""
    try:
        return _read(path).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): fetch it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, which is UTF-8 whatever the locale. Raises InputError, also for JSON that is no object."""
    return parse_json(_read(path), path)


def parse_json(data: bytes | str, where: object) -> dict[str, Any]:
    """The JSON object in a text; `where` names its source in errors. Infinity is allowed, as in diffusers' scheduler files.

    Raises InputError.
    """
    try:
        document = json_reader.parse_json(data, infinity=True)
    except ValueError as error:
        raise InputError(f"{where} is damaged or cut short, it is no JSON ({error}): fetch it again") from error
    if not isinstance(document, dict):
        raise InputError(f"{where} holds {_JSON_TYPES.get(type(document), 'a number')} and not a JSON object: fetch it again")
    return document


def _read(path: Path) -> bytes:
    try:
        return read_bounded(check_file(path), MAX_BYTES)
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error


_JSON_TYPES = {list: "a list", str: "a string", type(None): "null", bool: "a truth value"}
