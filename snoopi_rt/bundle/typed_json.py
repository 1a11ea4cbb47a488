"""Frozen dataclasses to and from JSON by their annotations: a missing, unknown or mistyped key is an error that names it.

A field with a default may be missing, so that documents written before the field existed can be read.
"""

import json
import math
from dataclasses import MISSING, asdict, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from snoopi_rt.errors import BundleError

T = TypeVar("T")
UNSAVED = {"saved": False}
"""The metadata of a field that is not part of the document."""


def to_json(value: Any) -> dict[str, Any]:
    """The dataclass as a document for `json.dumps`."""
    document = asdict(value)
    return {name: document[name] for name in _saved(type(value))}


def from_json(kind: type[T], document: dict[str, Any]) -> T:
    """The document as that dataclass. Raises BundleError."""
    return _parse(kind, document, "")


def _parse(kind: Any, value: Any, where: str) -> Any:
    optional = get_origin(kind) is UnionType  # X | None is the only union there is
    if optional and value is None:
        return None
    kind = get_args(kind)[0] if optional else kind
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        construct: Any = kind
        hints, prefix, defaults = get_type_hints(kind), f"{where}." if where else "", _saved(kind)
        if missing := [name for name, default in defaults.items() if name not in value and default is MISSING]:
            raise BundleError(f"it has no key {prefix}{missing[0]}")
        if unknown := [name for name in value if name not in defaults]:
            raise BundleError(f"unknown key {prefix}{unknown[0]}")
        return construct(**{name: _parse(hints[name], value[name], f"{prefix}{name}") for name in defaults if name in value})
    if origin is tuple and isinstance(value, list):
        items = args[:1] * len(value) if args[-1] is ... else args
        if len(items) == len(value):
            return tuple(_parse(item, entry, f"{where}[{index}]") for index, (item, entry) in enumerate(zip(items, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {key: _parse(args[1], entry, f"{where}.{key}") for key, entry in value.items()}
    if kind is float:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    elif value in args if origin is Literal else type(value) is kind:
        return value
    raise BundleError(f"key {where} must be {_named(kind)}{' or null' if optional else ''}, got {json.dumps(value)[:60]}")


def _saved(kind: Any) -> dict[str, Any]:
    """The fields of the document with their defaults."""
    return {entry.name: entry.default for entry in fields(kind) if entry.metadata.get("saved", True)}


def _named(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return "a list" if get_args(kind)[-1] is ... else f"a list of {len(get_args(kind))}"
    return {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}.get(kind, "an object")
