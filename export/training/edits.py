"""What a negative prompt should do to a prompt's picture, told as another prompt: a file of prompt, negative prompt and wanted prompt.

`a blurry cat` less `blurry` should be the picture of `a cat`, and `a cat` less `a dog` that of `a cat`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from snoopi_rt.batch.prompt_file import PromptFile
from snoopi_rt.batch.prompt_formats import InvalidRow
from snoopi_rt.errors import InputError

KEYS = ("prompt", "negative_prompt", "wanted_prompt")
"""The columns of a file of edits."""


@dataclass(frozen=True)
class Edit:
    """One row: with the negative, the prompt's picture should be that of the wanted prompt."""

    prompt: str
    negative: str
    wanted_prompt: str

    @property
    def changes(self) -> bool:
        """Whether the negative has anything to do with the prompt."""
        return self.prompt != self.wanted_prompt


def read_edits(path: Path) -> Iterator[Edit]:
    """The rows of a file of any format that `PromptFile` reads, with the columns KEYS. Raises InputError naming the first bad row."""
    with PromptFile(path, names=KEYS) as file:
        for place, record in file.records():
            row = {} if isinstance(record, InvalidRow) else record
            texts = {key: row.get(key) for key in KEYS}
            if missing := [key for key, text in texts.items() if not (isinstance(text, str) and text.strip())]:
                raise InputError(f"{file.word} {place} of {path} has no text for {', '.join(missing)}")
            yield Edit(*map(str, texts.values()))


def check_edits(path: Path) -> None:
    """Reads a file of edits to its end. Raises InputError for a bad row, and if there is none at all."""
    if not sum(1 for _ in read_edits(path)):
        raise InputError(f"there is no edit in {path}")
