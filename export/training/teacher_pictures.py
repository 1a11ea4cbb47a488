"""What the teacher draws of pairs of noise and prompt, kept on disk, since a student sees each pair many times."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from snoopi_rt.export.weights.arrays import open_array


class TeacherPictures:
    """Clean latents by the number of their pair, drawn when they are first asked for, in two files of a folder.

    draw(pairs): latents (B, C, h, w). key: tells one set of pictures from another; what a stopped run has drawn is kept. Several
    processes may share the folder: they draw different pairs.
    """

    def __init__(self, folder: Path, key: str, count: int, shape: tuple[int, ...], draw: Callable[[Sequence[int]], Tensor]):
        folder.mkdir(parents=True, exist_ok=True)
        self._draw = draw
        self._latents = open_array(folder / f"{key}-{count}.npy", (count, *shape), np.float16)
        self._drawn = open_array(folder / f"{key}-{count}-drawn.npy", (count,), np.bool_)

    def __len__(self) -> int:
        return len(self._drawn)

    def latents(self, pairs: Sequence[int]) -> Tensor:
        """The teacher's pictures of these pairs, (B, C, h, w) fp32 on the CPU."""
        if not self._drawn[pairs].all():
            self._latents[pairs], self._drawn[pairs] = self._draw(pairs).half().cpu().numpy(), True
        return torch.from_numpy(self._latents[pairs]).float()
