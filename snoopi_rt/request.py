"""What a caller may ask for: lists are broadcast to one Request per image, and every wrong value is one clear InputError."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from snoopi_rt.bundle.bundle import GuidancePromise
from snoopi_rt.errors import InputError

SEEDS = 2**32
MAX_CHARACTERS = 32_000
"""Characters of a prompt: OpenAI's own limit. Longer ones would cost gigabytes in the tokenizer before their tokens could be counted."""
MAX_IMAGES = 10_000
"""Images of one call: all of them are in memory at its end."""
MAX_SHOWN = 200
"""Characters of a wrong value that an error shows."""


@dataclass(frozen=True)
class Request:
    """One image, which `Pipeline.run` draws. All fields are required: `negative_prompt` and `negative_scale` are None where there is no
    negative prompt, and a `negative_scale` of None beside one is the bundle's default."""

    prompt: str
    negative_prompt: str | None
    negative_scale: float | None
    seed: int

    @property
    def texts(self) -> list[str]:
        """The prompt, and the negative prompt if there is one."""
        return [text for text in (self.prompt, self.negative_prompt) if text is not None]

    def checked(self, guidance: GuidancePromise) -> "Request":
        """The request in its usual types, with the bundle's default scale if it has none. Raises InputError for a value out of range."""
        negative = _negative(self.negative_prompt, guidance)
        if negative is None and self.negative_scale is not None:
            raise InputError(f"negative scale {shown(self.negative_scale)} without a negative prompt: give both, or neither")
        scale = None if negative is None else _scale(self.negative_scale, guidance)
        return Request(prompt_text(self.prompt), negative, scale, check_seed(self.seed))


FIELDS = tuple(field.name for field in fields(Request))
"""What a request says: arguments of `Pipeline.generate`, columns of prompt files."""


def parse_requests(prompt: Any, negative_prompt: Any, negative_scale: Any, seed: Any, n: Any, guidance: GuidancePromise) -> list[Request]:
    """The n requests of each prompt, prompt by prompt, with seeds seed, seed + 1 and so on; raises InputError."""
    count = integer("n", n, 1, MAX_IMAGES)
    rows = _rows(prompt=prompt, negative_prompt=negative_prompt, negative_scale=negative_scale, seed=seed)
    if count * len(rows) > MAX_IMAGES:
        raise InputError(f"{count * len(rows)} images in one call, at most {MAX_IMAGES} are drawn: call several times")
    negatives = [_negative(row["negative_prompt"], guidance) for row in rows]
    # One scale for a list of prompts needs a negative prompt somewhere; a list of scales needs one wherever it has a scale.
    shared = any(negatives) and not isinstance(negative_scale, list | tuple)
    requests = []
    for place, (row, negative) in enumerate(zip(rows, negatives, strict=True), 1):
        scale = row["negative_scale"]
        if shared and negative is None:
            _scale(scale, guidance)
            scale = None
        try:
            first = Request(row["prompt"], negative, scale, 0).checked(guidance)
        except InputError as error:
            if len({shown(row["prompt"]) for row in rows}) == 1:  # also when the command line repeats one for every scale
                raise
            raise InputError(f"{error} (prompt {place} of {len(rows)})") from None
        requests += [replace(first, seed=number) for number in seeds_from(row["seed"], count)]
    return requests


def image_size(size: Sequence[int] | None, sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """(height, width): the first of the supported sizes if none is given; raises InputError for another one."""
    if size is None:
        return sizes[0]
    if not isinstance(size, list | tuple) or tuple(size) not in sizes:
        asked = "x".join(map(shown, reversed(size[:3]))) if isinstance(size, list | tuple) else shown(size)
        known = ", ".join(f"{width}x{height}" for height, width in sizes)
        raise InputError(f"size {asked} is not supported, choose from {known} (width x height)")
    return size[0], size[1]


def nearest_size(size: tuple[int, int], sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The supported size whose shape is most like it, and of those the one whose area is."""
    height, width = (max(1, side) for side in size)

    def distance(known: tuple[int, int]) -> tuple[float, float]:
        tall, wide = math.log(known[0] / height), math.log(known[1] / width)
        return round(abs(tall - wide), 6), abs(tall + wide)

    return min(sizes, key=distance)


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "WIDTHxHEIGHT"; raises InputError for anything else."""
    width, _, height = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and len(text) <= 20):
        raise InputError(f"size {shown(text)} is not WIDTHxHEIGHT, such as 512x512")
    return int(height), int(width)


def prompt_text(prompt: Any) -> str:
    """The prompt; raises InputError if it is no text, or an empty one."""
    if not isinstance(prompt, str):
        raise InputError(f"prompt must be text, got {shown(prompt)}")
    if not prompt.strip():
        raise InputError("prompt is empty: say what to draw")
    check_length("prompt", prompt)
    return prompt


def check_length(name: str, text: str) -> None:
    """Returns for a text that can be tokenized and passed on a command line, else raises InputError."""
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"{name} has {len(text)} characters, at most {MAX_CHARACTERS} are read")
    if "\0" in text:
        raise InputError(f"{name} contains a NUL character, which cannot be passed on a command line")


def check_seed(seed: Any) -> int:
    """The seed as an int, 7.0 being 7; raises InputError outside 0 to 2**32 - 1."""
    number = int(float(seed)) if isinstance(seed, Real) and not isinstance(seed, Integral) and float(seed).is_integer() else seed
    if not isinstance(number, Integral) or isinstance(number, bool) or not 0 <= int(number) < SEEDS:
        raise InputError(f"seed must be an integer from 0 to {SEEDS - 1}, got {shown(seed)}")
    return int(number)


def seeds_from(seed: Any, count: int) -> range:
    """`count` seeds from this one on, from one that nobody chose for None. Raises InputError if one of them lies outside the range."""
    first = secrets.randbelow(SEEDS - count + 1) if seed is None else check_seed(seed)
    if first + count > SEEDS:
        raise InputError(f"seed {first} and the {count - 1} after it reach beyond {SEEDS - 1}, the last seed")
    return range(first, first + count)


def _rows(**columns: Any) -> list[dict[str, Any]]:
    lengths = {name: len(column) for name, column in columns.items() if isinstance(column, list | tuple)}
    if len(set(lengths.values())) > 1:
        raise InputError(f"lists must have one length, got {', '.join(f'{name} {length}' for name, length in lengths.items())}")
    count = next(iter(lengths.values()), 1)
    if count == 0:
        raise InputError(f"{next(iter(lengths))} is an empty list")
    return [{name: column[row] if name in lengths else column for name, column in columns.items()} for row in range(count)]


def _negative(negative: Any, guidance: GuidancePromise) -> str | None:
    if negative is not None and not isinstance(negative, str):
        raise InputError(f"negative prompt must be text, got {shown(negative)}")
    if negative is None or not negative.strip():
        return None
    check_length("negative prompt", negative)
    if guidance.kind == "none":
        raise InputError(f"negative prompt {negative!r}: this bundle was exported without negative prompts (guidance none)")
    return negative


def _scale(scale: Any, guidance: GuidancePromise) -> float:
    """The scale, by default the bundle's; raises InputError if it is none of the bundle's."""
    if scale is None:
        return guidance.scale.default
    low, high = guidance.scale.min, guidance.scale.max
    real = isinstance(scale, Real) and not isinstance(scale, bool)
    if not real or not low <= scale <= high:  # no NaN either
        raise InputError(f"negative scale must be a number from {low} to {high}, got {shown(scale)}")
    return float(scale)


def integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """The value as an int; raises InputError if it is none, below `minimum` or above `maximum`."""
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or number < minimum or (maximum is not None and number > maximum):
        above = number is not None and number > minimum
        raise InputError(f"{name} must be an integer of at {f'most {maximum}' if above else f'least {minimum}'}, got {shown(value)}")
    return number


def shown(value: Any) -> str:
    """A wrong value as an error names it: bounded, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # an integer of more digits than Python prints, a nesting of a thousand, anybody's __repr__
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
