"""What a teacher draws of given noise and prompts, kept on disk: a student that starts from them sees each many times."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class TeacherPictures:
    """Clean latents by the number of their pair of noise and prompt, drawn when they are first asked for, in two files of a folder.

    What a stopped run has drawn is kept. Several processes may share the folder: they draw different pairs.
    """

    def __init__(self, folder: Path, key: str, count: int, shape: tuple[int, ...]):
        folder.mkdir(parents=True, exist_ok=True)
        self._latents = open_array(folder / f"{key}-{count}.npy", (count, *shape), np.float16)
        self._drawn = open_array(folder / f"{key}-{count}-drawn.npy", (count,), np.bool_)

    def get(self, numbers: Sequence[int], draw: Callable[[], Tensor]) -> Tensor:
        """The latents (B, C, h, w) fp32 of some pairs. draw() gives all of them, and is asked where one is missing."""
        places = list(numbers)
        if not self._drawn[places].all():
            self._latents[places] = draw().half().cpu().numpy()
            self._drawn[places] = True
        return torch.from_numpy(self._latents[places]).float()


def open_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """A file of zeros, which stay where nothing is written."""
    if not path.exists():
        beside = path.with_name(f".{path.name}.part")
        np.lib.format.open_memmap(beside, mode="w+", dtype=dtype, shape=shape).flush()
        beside.replace(path)
    return np.load(path, mmap_mode="r+")
