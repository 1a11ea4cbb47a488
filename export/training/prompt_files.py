"""The prompts to train on: read one after the other in constant memory, and looked at for words."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from snoopi_rt.engines.base import InputError
from snoopi_rt.prompt_file import STANDARD_INPUT, PromptFile
from snoopi_rt.prompt_formats import Wrong

KEYS = ("prompt", "caption", "text")
"""Where a row has its prompt: the first of these that is there. Other columns are ignored."""


def read_prompts(path: Path) -> Iterator[str]:
    """The prompts of a file of any format that `PromptFile` reads, without empty ones.

    Raises InputError for a file that cannot be read, and for a row without a prompt.
    """
    if path == STANDARD_INPUT:
        raise InputError("prompts to train on must be in a file: they are read again when a run is resumed")
    with PromptFile(path, names=KEYS) as file:
        for place, record in file.records():
            if isinstance(record, Wrong):
                raise InputError(f"{file.word} {place} of {path}: {record}")
            values = [record[key] for key in KEYS if key in record]
            prompt = next((value for value in values if value is not None), "" if values else None)
            if not isinstance(prompt, str):
                raise InputError(f"{file.word} {place} of {path} has no text under {', '.join(KEYS)}")
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
