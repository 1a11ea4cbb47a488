"""What a run is told: the states of its prompts, of its negatives, and of its edits."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from snoopi_rt.export.backbones import Denoiser
from snoopi_rt.export.training.edits import read_edits
from snoopi_rt.export.training.prompt_files import read_prompts
from snoopi_rt.export.training.recipe import Recipe
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.training.text_states import Text, TextStates, encode_prompts, shuffled, states_key


class Prompts:
    """The texts of one run by their rows in its files, on its device; row -1 is the empty prompt.

    first: the first prompts themselves. negatives: how many there are.
    """

    def __init__(self, task: Task, recipe: Recipe, denoiser: Denoiser, max_tokens: int, device: torch.device, dtype: torch.dtype):
        self._task, self._seed, self._batch = task, recipe.seed, recipe.batch
        self._denoiser, self._max_tokens, self._to = denoiser, max_tokens, (device, dtype)
        self._texts = self._states(task.prompts, "prompts")
        self._negatives = None if task.negatives is None else self._states(task.negatives, "negatives")
        self._edits = [] if task.edits is None else [self._edit_states(task.edits, part) for part in ("prompt", "negative", "wanted")]
        self.first, self.negatives = self._texts.first, len(self._negatives or ())

    def __len__(self) -> int:
        return len(self._texts)

    def batch(self, rows: Sequence[int]) -> Text:
        """These prompts."""
        return self._texts.batch(rows).to(*self._to)

    def negative(self, rows: Sequence[int]) -> Text | None:
        """These negatives, None where there are none."""
        return None if self._negatives is None else self._negatives.batch(rows).to(*self._to)

    def edit(self, rows: Sequence[int]) -> tuple[Text, Text, Text]:
        """The prompts, the negatives and the wanted prompts of these edits."""
        prompt, negative, wanted = (states.batch(rows).to(*self._to) for states in self._edits)
        return prompt, negative, wanted

    def of_step(self, step: int, samples: range) -> list[int]:
        """The rows of some samples of a step's batch: all prompts in a new order each time."""
        return [shuffled(step * self._batch + sample, len(self), self._seed) for sample in samples]

    def of_pairs(self, pairs: Sequence[int]) -> list[int]:
        """The rows of some pairs of noise and prompt, by their numbers."""
        return [pair % len(self) for pair in pairs]

    def _states(self, prompts: Path, name: str) -> TextStates:
        return self._encoded(lambda: read_prompts(prompts), prompts, name)

    def _edit_states(self, edits: Path, part: str) -> TextStates:
        return self._encoded(lambda: (getattr(edit, part) for edit in read_edits(edits)), edits, f"edits-{part}")

    def _encoded(self, texts: Callable[[], Iterable[str]], file: Path, name: str) -> TextStates:
        encoder = self._denoiser.prompt_encoder(self._task.teacher, self._max_tokens)
        key = states_key(file, self._task.teacher / "text_encoder")
        return encode_prompts(texts, key, encoder, self._denoiser.masked, self._task.states_folder(name))
