"""Settings in frozen dataclasses, read and changed by name: `lr`, or `lora.rank` for one in a group. No torch."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints

from snoopi_rt.errors import InputError

SIMILARITY = 0.75
"""Of a known name that an error suggests, by difflib: vsd.wieght is 0.9 like vsd.weight, smooth.weight 0.64 like edits.weight."""


def flattened(settings: Any) -> dict[str, Any]:
    """Every setting by its full name. A group is a field that holds a dataclass, or one entry of a field that holds a mapping of them."""
    return {name: getattr(group, field) for name, group, field in _walk(settings)}


def defaults(settings: Any) -> dict[str, Any]:
    """The default of every setting that has one, by full name."""
    values = {name: {own.name: own.default for own in fields(group)}[field] for name, group, field in _walk(settings)}
    return {name: value for name, value in values.items() if value is not MISSING}


def changed(settings: Any, values: Mapping[str, Any]) -> Any:
    """A copy with new values, by full name. Raises InputError for an unknown name and for values that the dataclass refuses."""
    _check_names(values, flattened(settings))
    return _changed(settings, values)


def parsed(
    settings: Any,
    texts: Sequence[str],
    *,
    names: Collection[str] | None = None,
    former: Mapping[str, str] | None = None,
    new_groups: str | None = None,
) -> Any:
    """The values of KEY=VALUE texts by full name, each of the type that its field declares; commas separate the numbers of a tuple.

    names: the settings that may be set, all by default. former: names that settings had before, with their present ones.
    new_groups: how a group is added, for the error that an unknown one gets.
    Raises InputError for an unknown or former name, and for a value of another type.
    """
    kinds = {name: get_type_hints(type(group))[field] for name, group, field in _walk(settings)}
    values = {}
    for text in texts:
        name, _, value = text.partition("=")
        if former and name in former:
            raise InputError(f"setting {name} is now called {former[name]}: --set {former[name]}={value}")
        _check_names([name], kinds if names is None else names, new_groups)
        try:
            values[name] = _value(kinds[name], value)
        except ValueError as error:
            raise InputError(f"setting {name} is {value!r}, which is not {error}") from None
    return values


def check_choices(settings: Any) -> None:
    """Raises InputError for a setting declared as a Literal that has none of its values."""
    for name, group, field in _walk(settings):
        choices, value = get_args(get_type_hints(type(group))[field]), getattr(group, field)
        if all(isinstance(choice, str) for choice in choices) and choices and value not in choices:
            raise InputError(f"{name} is {value!r}, choose from {', '.join(choices)}")


def _walk(settings: Any) -> Iterator[tuple[str, Any, str]]:
    """Full name, dataclass and field name of every setting."""
    for field in fields(settings):
        member = getattr(settings, field.name)
        groups = member if isinstance(member, Mapping) else {field.name: member} if is_dataclass(member) else None
        if groups is None:
            yield field.name, settings, field.name
        else:
            for group, inner in groups.items():
                yield from ((f"{group}.{name}", holder, own) for name, holder, own in _walk(inner))


def _changed(settings: Any, values: Mapping[str, Any]) -> Any:
    own: dict[str, Any] = {name: value for name, value in values.items() if "." not in name}

    def of(group: str) -> dict[str, Any]:
        return {name.removeprefix(f"{group}."): value for name, value in values.items() if name.startswith(f"{group}.")}

    for field in fields(settings):
        member = getattr(settings, field.name)
        if isinstance(member, Mapping):
            own[field.name] = {group: _changed(inner, of(group)) for group, inner in member.items()}
        elif is_dataclass(member):
            own[field.name] = _changed(member, of(field.name))
    return replace(settings, **own)


def _check_names(names: Collection[str], known: Collection[str], new_groups: str | None = None) -> None:
    for name in names:
        if name in known:
            continue
        remark, group = "", name.rpartition(".")[0]
        if nearest := get_close_matches(name, known, n=1, cutoff=SIMILARITY):
            remark = f" (did you mean {nearest[0]}?)"
        elif new_groups and group and not any(other.startswith(f"{group}.") for other in known):
            remark = f" (no group {group!r}: {new_groups})"
        raise InputError(f"unknown setting {name!r}{remark}, choose from {', '.join(known)}")


def _value(kind: Any, text: str) -> Any:
    """The value of a text. Raises ValueError that says what would be one."""
    if kind == tuple[float, ...]:
        return tuple(_value(float, part) for part in text.split(","))
    if choices := get_args(kind):
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false")
        return text.lower() == "true"
    try:
        value = kind(text)
    except ValueError:
        raise ValueError("a whole number" if kind is int else "a number") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a finite number")
    return value
