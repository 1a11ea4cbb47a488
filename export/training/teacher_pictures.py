"""What a teacher draws of given noise and prompts, kept on disk: a student that starts from them sees each many times."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from snoopi_rt.export.training.text_states import shuffled

if TYPE_CHECKING:
    from snoopi_rt.export.training.distillation import Distillation


class TeacherPictures:
    """Clean latents by the number of their pair of noise and prompt, drawn when they are first asked for, in two files of a folder.

    What a stopped run has drawn is kept. Several processes may share the folder: they draw different pairs.
    """

    def __init__(self, run: "Distillation", folder: Path, key: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._run, self._count = run, run.recipe.warm_pairs
        self._latents = open_array(folder / f"{key}-{self._count}.npy", (self._count, *run.shape), np.float16)
        self._drawn = open_array(folder / f"{key}-{self._count}-drawn.npy", (self._count,), np.bool_)

    def latents(self, pairs: Sequence[int]) -> Tensor:
        """The teacher's pictures of these pairs (B, C, h, w) fp32 on the run's device."""
        if not self._drawn[pairs].all():
            drawn = self._run.teacher_pictures(*self._run.given(pairs), self._run.recipe.warm_calls)
            self._latents[pairs], self._drawn[pairs] = drawn.half().cpu().numpy(), True
        return torch.from_numpy(self._latents[pairs]).float().to(self._run.device)

    def loss(self, step: int, samples: range) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Clean latents (B, C, h, w) of the student, and their distance to what the teacher makes of the same noise."""
        run, first = self._run, step * self._run.recipe.batch
        pairs = [shuffled(first + sample, self._count, run.recipe.seed) for sample in samples]
        target = self.latents(pairs)
        x0 = run.clean(*run.given(pairs), None)
        loss = nn.functional.mse_loss(x0, target)
        return x0, loss, {"warm": loss}


def open_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """A file of zeros, which stay where nothing is written."""
    if not path.exists():
        beside = path.with_name(f".{path.name}.part")
        np.lib.format.open_memmap(beside, mode="w+", dtype=dtype, shape=shape).flush()
        beside.replace(path)
    return np.load(path, mmap_mode="r+")
