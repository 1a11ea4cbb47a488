"""The prompts of a run as text states on its device."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from snoopi_rt.export.backbones import Denoiser
from snoopi_rt.export.training.prompt_files import read_prompts
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.training.text_states import TextBatch, TextStates, encode_prompts, states_key


class TrainingPrompts:
    """The prompts to train on and the negative prompts (None without), each by its row in its file."""

    def __init__(self, task: Task, denoiser: Denoiser, max_tokens: int, device: torch.device, dtype: torch.dtype):
        self._task, self._denoiser, self._max_tokens, self._on = task, denoiser, max_tokens, (device, dtype)
        self._prompts = self.encode(task.prompts, partial(read_prompts, task.prompts), "prompts")
        self.negatives = None if task.negatives is None else self.encode(task.negatives, partial(read_prompts, task.negatives), "negatives")
        self.first = self._prompts.first

    def __len__(self) -> int:
        return len(self._prompts)

    def batch(self, rows: Sequence[int]) -> TextBatch:
        """The states of these prompts; row -1 is the empty one."""
        return self._prompts.batch(rows)

    def unconditional(self, count: int) -> TextBatch:
        """So many empty prompts."""
        return self._prompts.batch([-1] * count)

    def encode(self, file: Path, texts: Callable[[], Iterable[str]], name: str) -> TextStates:
        """The states of the texts that are read from a file, kept under `name` among the run's text states."""
        encoder = self._denoiser.caption_encoder(self._task.teacher, self._max_tokens)
        key = states_key(file, self._task.teacher / "text_encoder")
        return encode_prompts(texts, key, encoder, self._denoiser.masked, self._task.states_folder(name)).on(*self._on)
