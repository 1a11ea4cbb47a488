"""Prompts from files of any length, one after the other, in constant memory."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from snoopi_rt.engines.base import EngineMissing, InputError

KEYS = ("prompt", "caption", "text")
"""Where a row of JSONL or Parquet has its prompt: the first of these that is there."""


def read_prompts(path: Path) -> Iterator[str]:
    """The prompts of a .txt (one a line), .jsonl or .parquet file, without empty ones.

    Raises InputError for a file of another kind, one that cannot be read, and a row without a prompt.
    """
    readers = {".txt": _lines, ".jsonl": _objects, ".parquet": _rows}
    if path.suffix not in readers:
        raise InputError(f"{path} is not one of {', '.join(readers)}")
    if not path.is_file():
        raise InputError(f"no file {path}")
    for number, prompt in readers[path.suffix](path):
        if not isinstance(prompt, str):
            raise InputError(f"row {number} of {path} has no text under {', '.join(KEYS)}")
        if prompt.strip():
            yield prompt.strip()


def has_words(prompt: str, words: str) -> bool:
    """Whether these words, whole and in this order, are in the prompt; upper and lower case are the same."""
    # Most prompts have not even the letters, and patterns of many words would be compiled anew each time.
    return words.lower() in prompt.lower() and _pattern(words).search(prompt) is not None


def without(prompt: str, phrases: Sequence[str]) -> str:
    """The prompt less these words, and less the `and`, commas and spaces that they leave behind: `a blurry cat and a dog, grainy` less
    `blurry`, `a dog` and `grainy` is `a cat`.

    A prompt that has none of them stays as it is.
    """
    phrases = [words for words in phrases if has_words(prompt, words)]
    if not phrases:
        return prompt
    for words in phrases:
        prompt = _pattern(words, r"(?:\s+and\s+{0}|{0}\s+and\s+|{0})").sub("", prompt)
    parts = (" ".join(part.split()) for part in prompt.split(","))
    return ", ".join(part for part in parts if part)


def has_beside_others(prompt: str, words: str) -> bool:
    """Whether `and` joins these words to others: `a dog` in `a cat and a dog on a red background`."""
    return has_words(prompt, words) and _pattern(words, r"(?:\band\s+{0}|{0}\s+and\b)").search(prompt) is not None


def is_of(prompt: str, words: str) -> bool:
    """Whether these words are all that the prompt is a picture of: they begin it or follow `of`, and no `and` joins others to them."""
    return _pattern(words, r"(?:^|\bof\s+){0}(?!\s+and\b)").search(prompt) is not None


def _pattern(words: str, around: str = "{0}") -> re.Pattern[str]:
    """Of the words, whole, where {0} stands in `around`; upper and lower case are the same."""
    return re.compile(around.format(rf"(?<!\w){re.escape(words)}(?!\w)"), re.IGNORECASE)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from enumerate(file, 1)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text") from error


def _objects(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in _lines(path):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"line {number} of {path} is not JSON: {error}") from error
            yield number, next((row[key] for key in KEYS if key in row), None) if isinstance(row, dict) else row


def _rows(path: Path) -> Iterator[tuple[int, object]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise EngineMissing(f'{path} needs pyarrow: pip install "snoopi-rt[train]"') from error
    try:
        file = parquet.ParquetFile(path)
        column = next((key for key in KEYS if key in file.schema_arrow.names), None)
        if column is None:
            raise InputError(f"{path} has no column {', '.join(KEYS)}")
        number = 0
        for batch in file.iter_batches(1024, columns=[column]):
            for prompt in batch[column].to_pylist():
                number += 1
                yield number, prompt
    except ArrowInvalid as error:
        raise InputError(f"{path} is not a whole Parquet file") from error
