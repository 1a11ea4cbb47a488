"""What a run is told: the states of its prompts, of the same without their stressed words, and of its negatives."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from snoopi_rt.export.backbones import Denoiser
from snoopi_rt.export.training.prompt_files import read_prompts, without
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
        self._unstressed = self._states(task.prompts, "unstressed", recipe.stressed_words) if recipe.stressed_words else None
        self._negatives = None if task.negatives is None else self._states(task.negatives, "negatives")
        self.first, self.negatives = self._texts.first, len(self._negatives or ())

    def __len__(self) -> int:
        return len(self._texts)

    def batch(self, rows: Sequence[int]) -> Text:
        """These prompts."""
        return self._texts.batch(rows).to(*self._to)

    def without_stress(self, rows: Sequence[int]) -> Text | None:
        """These prompts without the words that are stressed, None where no words are."""
        return None if self._unstressed is None else self._unstressed.batch(rows).to(*self._to)

    def negative(self, rows: Sequence[int]) -> Text | None:
        """These negatives, None where there are none."""
        return None if self._negatives is None else self._negatives.batch(rows).to(*self._to)

    def of_step(self, step: int, samples: range) -> list[int]:
        """The rows of some samples of a step's batch: all prompts in a new order each time."""
        return [shuffled(step * self._batch + sample, len(self), self._seed) for sample in samples]

    def of_pairs(self, pairs: Sequence[int]) -> list[int]:
        """The rows of some pairs of noise and prompt, by their numbers."""
        return [pair % len(self) for pair in pairs]

    def encoded(self, texts: Callable[[], Iterable[str]], key: str, folder: Path) -> TextStates:
        """The states of other texts, kept in a folder under a key."""
        encoder = self._denoiser.prompt_encoder(self._task.teacher, self._max_tokens)
        return encode_prompts(texts, key, encoder, self._denoiser.masked, folder)

    def _states(self, prompts: Path, name: str, less: Sequence[str] = ()) -> TextStates:
        """Of the prompts of a file, without the words `less`."""

        def texts() -> Iterator[str]:
            return (without(prompt, less) for prompt in read_prompts(prompts)) if less else read_prompts(prompts)

        key = " less ".join([states_key(prompts, self._task.teacher / "text_encoder"), *less])
        return self.encoded(texts, key, self._task.states_folder(name))
