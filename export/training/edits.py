"""What a negative prompt should do to a prompt's picture, told as another prompt: rows of prompt, negative prompt and wanted prompt.

`a blurry cat` less `blurry` should be the picture of `a cat`, and `a cat` less `a dog` that of `a cat`. The student with NASA learns to
draw, from the same noise, what it draws of the wanted prompt without a negative. Its own pictures are as sharp as it is, and follow it
while it learns; what keeps them good is the rest of the loss. No picture of anybody else is needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from snoopi_rt.batch.prompt_file import PromptFile
from snoopi_rt.batch.prompt_formats import Wrong
from snoopi_rt.errors import InputError
from snoopi_rt.export.training.loop import generator
from snoopi_rt.export.training.text_states import shuffled

if TYPE_CHECKING:
    from snoopi_rt.export.training.distillation import Distillation

KEYS = ("prompt", "negative_prompt", "wanted_prompt")


@dataclass(frozen=True)
class Edit:
    """One row: with the negative, the prompt's picture should be that of the wanted prompt."""

    prompt: str
    negative: str
    wanted: str

    @property
    def changes(self) -> bool:
        """Whether the negative has anything to do with the prompt."""
        return self.prompt != self.wanted


def read_edits(path: Path) -> Iterator[Edit]:
    """The rows of a file of any format that `PromptFile` reads, with the columns KEYS.

    Raises InputError naming the first row that is none.
    """
    with PromptFile(path, names=KEYS) as file:
        for place, record in file.records():
            texts = [] if isinstance(record, Wrong) else [record.get(key) for key in KEYS]
            if not all(isinstance(text, str) and text.strip() for text in texts) or not texts:
                raise InputError(f"{file.word} {place} of {path} has no text for {', '.join(KEYS)}")
            yield Edit(*map(str, texts))


def check_edits(path: Path) -> None:
    """Returns for a file of edits that can be read to its end and holds one; else raises InputError."""
    if not sum(1 for _ in read_edits(path)):
        raise InputError(f"there is no edit in {path}")


class Edits:
    """The loss of one run's edits. Rows that change the picture are heeded at the largest scale, the others must hold at every scale."""

    def __init__(self, run: "Distillation", changes: list[bool]):
        self._run, self._changes = run, torch.tensor(changes)

    def loss(self, step: int, samples: range) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Clean latents (B, C, h, w) under a negative, the loss, and the mean squared distances that it is made of."""
        run, recipe = self._run, self._run.recipe
        rows = [shuffled(step * recipe.batch + sample, len(self._changes), recipe.seed) for sample in samples]
        random = [generator(recipe.seed, step, sample, "edit") for sample in samples]
        noise = torch.stack([torch.randn(*run.shape, generator=each) for each in random]).to(run.device)
        changes = self._changes[rows].to(run.device)
        share = torch.stack([torch.rand((), generator=each) for each in random]).to(run.device)
        prompt, negative, wanted = run.prompts.edit(rows)
        with torch.no_grad():
            target = run.clean(noise, wanted, None)
        x0 = run.clean(noise, prompt, (negative, recipe.nasa_max * torch.where(changes, 1.0, share)))
        distance = (x0 - target).square().mean((1, 2, 3))
        parts = {name: (distance * chosen).sum() / chosen.sum().clamp(min=1) for name, chosen in (("heeded", changes), ("kept", ~changes))}
        return x0, distance.mean(), parts
