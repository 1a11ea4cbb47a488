"""Features of images and texts, kept on disk by what they were made of."""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from snoopi_rt.export.evaluation.image_sets import ImageSet
from snoopi_rt.files import write_whole

BATCH = 16
"""Images whose features are computed together, and kept in one file. Always the same ones: a stopped run goes on to the same bits."""


@dataclass(frozen=True)
class FeatureCache:
    """A folder of features, a file per network and batch of SHA-256."""

    folder: Path

    def of_images(self, network: str, images: ImageSet, compute: Callable[[range], np.ndarray]) -> np.ndarray:
        """(N, D) fp32 features of all images by a network. network: its identity; compute: those of images by their places."""
        return self._kept(network, images.hashes, compute, f"{network.split()[0]} of {images.name}")

    def of_texts(self, network: str, texts: Sequence[str], compute: Callable[[range], np.ndarray]) -> np.ndarray:
        """(N, D) fp32 features of all texts by a network."""
        hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        return self._kept(f"{network} texts", hashes, compute, f"{network.split()[0]} of prompts")

    def _kept(self, network: str, hashes: Sequence[str], compute: Callable[[range], np.ndarray], label: str) -> np.ndarray:
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = []
        steps = range(0, len(hashes), BATCH)
        for start in tqdm(steps, desc=label, unit="batch", leave=False, disable=len(steps) < 3):
            places = range(start, min(start + BATCH, len(hashes)))
            key = hashlib.sha256("\n".join([network, *(hashes[i] for i in places)]).encode()).hexdigest()
            path = self.folder / f"{key[:40]}.npy"
            if not path.exists():
                data = io.BytesIO()
                np.save(data, np.asarray(compute(places), np.float32), allow_pickle=False)
                write_whole(path, data.getvalue())
            parts.append(np.load(path, allow_pickle=False))
        return np.concatenate(parts)
