"""Features of pictures by EfficientNet-Lite: ImageNet's, pooled, as the small domain's judge and `lite2` have them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from snoopi_rt.export.evaluation.weight_files import loading
from snoopi_rt.export.small_model.features import load_network, to_network, weights_file

SIDES = {"lite0": 224, "lite2": 260}  # pixels that each network was trained on


class Lite:
    """Pooled features (N, 1280) fp32 of pictures, resized to what the network was trained on.

    weights: the file to load, by default that of the network's package. Raises InputError for another network's, EngineMissing.
    """

    def __init__(self, name: Literal["lite0", "lite2"], weights: Path | None = None, device: str = "cpu") -> None:
        self.name, self.weights, self.side, self._device = name, weights or weights_file(name), SIDES[name], device
        with loading(self.weights, f"efficientnet-{name}"):
            network = load_network(name, self.weights)
        self._network = network.to(device, memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image] | Sequence[np.ndarray] | np.ndarray, batch: int = 8) -> np.ndarray:
        """pictures: images in RGB, or (H, W, 3) uint8."""
        rows = []
        steps = range(0, len(pictures), batch)
        for start in tqdm(steps, desc=f"features ({self.name})", unit="batch", leave=False, disable=len(steps) < 5):
            part = np.stack([self._resized(picture) for picture in pictures[start : start + batch]])
            scaled = torch.from_numpy(part).to(self._device).permute(0, 3, 1, 2).float().div(127.5).sub(1)
            features = self._network.extract_features(to_network(scaled.contiguous(memory_format=torch.channels_last)))
            rows.append(features.mean((2, 3)).cpu().numpy())
        return np.concatenate(rows) if rows else np.zeros((0, 1280), np.float32)

    def _resized(self, picture: Image.Image | np.ndarray) -> np.ndarray:
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        return np.asarray(image.resize((self.side, self.side), Image.Resampling.BICUBIC))
