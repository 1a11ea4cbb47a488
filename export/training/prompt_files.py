"""The prompts to train on, read one by one in constant memory."""

from collections.abc import Iterator
from pathlib import Path

from snoopi_rt.batch.prompt_file import STANDARD_INPUT, PromptFile
from snoopi_rt.batch.prompt_formats import InvalidRow
from snoopi_rt.errors import InputError

KEYS = ("prompt", "caption", "text")
"""The columns of a prompt: the first of these that a row has. All others are ignored."""


def check_prompts(path: Path) -> None:
    """Reads a file of prompts to its end. Raises InputError for a bad row, and if there is no prompt at all."""
    if not sum(1 for _ in read_prompts(path)):
        raise InputError(f"there is no prompt in {path}")


def read_prompts(path: Path) -> Iterator[str]:
    """The prompts of a file of any format that `PromptFile` reads, skipping empty ones.

    Raises InputError for a file that cannot be read, and for a row without a prompt.
    """
    if path == STANDARD_INPUT:
        raise InputError("prompts to train on must be in a file: they are read again when a run is resumed")
    with PromptFile(path, names=KEYS) as file:
        for place, record in file.records():
            if isinstance(record, InvalidRow):
                raise InputError(f"{file.word} {place} of {path}: {record}")
            values = [record[key] for key in KEYS if key in record]
            prompt = next((value for value in values if value is not None), "" if values else None)
            if not isinstance(prompt, str):
                raise InputError(f"{file.word} {place} of {path} has no text under {', '.join(KEYS)}")
            if prompt.strip():
                yield prompt.strip()
