"""Many things done beside each other by threads: libraries that compute for long without Python's lock make them worth it."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from snoopi_rt.engines.threads import available_threads

PART = 32  # images
Item = TypeVar("Item")
Answer = TypeVar("Answer")


def in_threads(
    function: Callable[[Item], Answer],
    items: Sequence[Item],
    label: str = "",
    workers: int | None = None,
    unit: str = "batch",
    few: int = 2,
) -> list[Answer]:
    """The function's answers, in the order of the items. workers: threads, by default one per core. A labelled bar shows if there
    are more than `few` items."""
    with ThreadPoolExecutor(workers or available_threads()) as pool:
        return list(tqdm(pool.map(function, items), label, len(items), unit=unit, leave=False, disable=not label or len(items) <= few))


def by_parts(metric: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """A metric (N,) of images (N, H, W, 3) that takes some images in each thread: faster, and all at once would take gigabytes."""

    @wraps(metric)
    def whole(pictures: np.ndarray) -> np.ndarray:
        parts = [pictures[start : start + PART] for start in range(0, len(pictures), PART)]
        return np.concatenate(in_threads(metric, parts)) if parts else metric(pictures)

    return whole
