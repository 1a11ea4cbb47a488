"""A judge of the small domain that nothing is trained towards: ImageNet features by EfficientNet-Lite2, against an unseen set of drawings.

Pictures and drawings are compared by the cosine of their pooled features, less the mean of the drawings': recognition asks whether the
thing's own Twemoji drawing is among the nearest.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from snoopi_rt.export.small_model.dataset.compose import Composer
from snoopi_rt.export.small_model.dataset.scene import DEFAULT_STYLE, Scene
from snoopi_rt.export.small_model.dataset.sprites import TRAINED, UNSEEN, load_sprites
from snoopi_rt.export.small_model.dataset.vocabulary import DEFAULT_BACKGROUND, things
from snoopi_rt.export.small_model.features import load_network, to_network
from snoopi_rt.export.weights.files import save_tensors

SIDES = {"lite0": 224, "lite2": 260}  # pixels that each network was trained on
REFERENCE = UNSEEN[0].style
TOP = 5


class Judge:
    """Features of pictures, and the things that they show, for references drawn from npm packages that are fetched into `drawings`."""

    def __init__(self, drawings: Path, network: Literal["lite0", "lite2"] = "lite2"):
        self.name, self._side = network, SIDES[network]
        self._network = load_network(network).to(memory_format=torch.channels_last)
        self._drawings = drawings
        self.names = [thing.name for thing in things()]
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self._composer = lru_cache(1)(lambda: Composer(load_sprites(drawings, [*TRAINED, UNSEEN[0]])))

    @torch.no_grad()
    def features(self, pictures: np.ndarray, batch: int = 32) -> Tensor:
        """(N, 1280) fp32 of pictures (N, H, W, 3) uint8, resized to what the network was trained on."""
        rows = []
        for start in tqdm(range(0, len(pictures), batch), desc=f"features ({self.name})", unit="batch", disable=len(pictures) <= 4 * batch):
            part = np.stack([self._resized(picture) for picture in pictures[start : start + batch]])
            scaled = torch.from_numpy(part).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
            rows.append(self._network.extract_features(to_network(scaled)).mean((2, 3)))
        return torch.cat(rows)

    def ranks(self, features: Tensor, names: Sequence[str], background: str | None = None) -> np.ndarray:
        """How many drawings of other things are nearer than the named thing's own, (N,); 0 is recognised at once.

        background: of the reference drawings, where the pictures have one that is not white.
        """
        reference = self.references(REFERENCE, background)
        own = torch.tensor([self._numbers[name] for name in names])
        # Each kind of picture less its own mean drawing: what all of one set have in common tells nothing apart.
        similarity = _unit(features - self.references(DEFAULT_STYLE, background).mean(0)) @ _unit(reference - reference.mean(0)).T
        return (similarity > similarity.gather(1, own[:, None])).sum(1).numpy()

    def ceiling(self, background: str | None = None) -> np.ndarray:
        """The ranks of the real drawings of the default set, one per thing."""
        return self.ranks(self.references(DEFAULT_STYLE, background), self.names, background)

    def references(self, style: str, background: str | None = None) -> Tensor:
        """Features of all things in one set of drawings, (T, 1280), kept beside the drawings."""
        return self._references(style, background or DEFAULT_BACKGROUND)

    @lru_cache(64)  # noqa: B019 - a judge lives as long as its evaluation
    def _references(self, style: str, background: str) -> Tensor:
        path = self._drawings / f"features-{self.name}-{style}-{background}-{len(self.names)}.safetensors"
        if not path.exists():
            scenes = [Scene((name,), style=style, background=background) for name in self.names]
            pictures = np.stack([self._composer().draw(scene, None, 256) for scene in scenes])
            save_tensors(path, {"features": self.features(pictures)})
        from safetensors.torch import load_file

        return load_file(path)["features"]

    def _resized(self, picture: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(picture).resize((self._side, self._side), Image.Resampling.BICUBIC))


def _unit(rows: Tensor) -> Tensor:
    return nn.functional.normalize(rows, dim=1)
