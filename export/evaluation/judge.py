"""A judge of the small domain that nothing is trained towards: ImageNet features by EfficientNet-Lite2, against an unseen set of drawings.

Pictures and drawings are compared by the cosine of their pooled features, less the mean of the drawings': recognition asks whether the
thing's own Twemoji drawing is among the nearest.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from snoopi_rt.export.small_model.dataset import compose
from snoopi_rt.export.small_model.dataset.compose import Composer
from snoopi_rt.export.small_model.dataset.scene import DEFAULT_STYLE, Scene
from snoopi_rt.export.small_model.dataset.sprites import TRAINED, UNSEEN, DrawingSet, load_sprites
from snoopi_rt.export.small_model.dataset.vocabulary import things
from snoopi_rt.export.small_model.features import load_network, to_network, weights_file
from snoopi_rt.export.weights.files import fingerprint, save_tensors

SIDES = {"lite0": 224, "lite2": 260}  # pixels that each network was trained on
TOP = 5
MANY = 64  # scenes


class Judge:
    """Features of pictures, and the things that they show, by the drawings of a set that nothing is trained with.

    references: the folder that keeps the features of many scenes, since they take minutes. names: the things that it tells apart; all by
    default. sets: the drawings that its composer has beside those of UNSEEN.
    """

    def __init__(
        self,
        references: Path,
        network: Literal["lite0", "lite2"] = "lite2",
        names: Sequence[str] | None = None,
        sets: Sequence[DrawingSet] = TRAINED,
    ):
        self.name, self._side = network, SIDES[network]
        self.hash = fingerprint(weights_file(network))
        self._network = load_network(network).to(memory_format=torch.channels_last)
        self._folder, self._sets = references, (*sets, UNSEEN)
        self.sets = [drawing.package for drawing in self._sets]
        self.names = [thing.name for thing in things()] if names is None else list(names)
        self._references: dict[str, Tensor] = {}

    @cached_property
    def composer(self) -> Composer:
        """Draws all things in all sets."""
        return Composer(load_sprites(self._sets, self.names))

    @torch.no_grad()
    def features(self, pictures: np.ndarray | Sequence[np.ndarray], batch: int = 8) -> Tensor:
        """(N, 1280) fp32 of pictures, (H, W, 3) uint8 each, resized to what the network was trained on."""
        rows = []
        steps = range(0, len(pictures), batch)
        for start in tqdm(steps, desc=f"features ({self.name})", unit="batch", leave=False, disable=len(steps) < 5):
            part = np.stack([self._resized(picture) for picture in pictures[start : start + batch]])
            scaled = torch.from_numpy(part).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
            rows.append(self._network.extract_features(to_network(scaled)).mean((2, 3)))
        return torch.cat(rows) if rows else torch.zeros(0, 1280)

    def ranks(self, features: Tensor, names: Sequence[str]) -> np.ndarray:
        """How many drawings of other things are nearer than the named thing's own, (N,), for pictures on white; 0 is recognised at once."""
        # Each kind of picture less its own mean drawing: what all of one set have in common tells nothing apart.
        drawings, reference = (self.of_scenes(self._scenes(style)) for style in (DEFAULT_STYLE, UNSEEN.style))
        own = [self.names.index(name) for name in names]
        return ranks(features - drawings.mean(0), reference - reference.mean(0), own)

    def ceiling(self) -> np.ndarray:
        """The ranks of the real drawings of the default set, one per thing."""
        return self.ranks(self.of_scenes(self._scenes(DEFAULT_STYLE)), self.names)

    def of_scenes(self, scenes: Sequence[Scene], side: int = 256) -> Tensor:
        """Features of scenes as they are composed without chance, (N, 1280); those of many are kept on disk."""
        made_by = (self.hash, fingerprint(Path(compose.__file__)), self.sets, side, tuple(scenes))
        key = hashlib.sha256(repr(made_by).encode()).hexdigest()[:16]
        if key not in self._references:
            path = self._folder / f"features-{self.name}-{key}.safetensors"
            if path.exists():
                self._references[key] = load_file(path)["features"]
            else:
                self._references[key] = self.features(np.stack([self.composer.draw(scene, None, side) for scene in scenes]))
                if len(scenes) >= MANY:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    save_tensors(path, {"features": self._references[key]})
        return self._references[key]

    def _scenes(self, style: str) -> list[Scene]:
        return [Scene((name,), style=style) for name in self.names]

    def _resized(self, picture: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(picture).resize((self._side, self._side), Image.Resampling.BICUBIC))


def ranks(features: Tensor, references: Tensor, own: Sequence[int]) -> np.ndarray:
    """How many references (M, D) are nearer to each row (N, D) by cosine than its own, (N,)."""
    similarity = _unit(features) @ _unit(references).T
    return (similarity > similarity.gather(1, torch.tensor(own, dtype=torch.int64)[:, None])).sum(1).numpy()


def cosine_distance(a: Tensor, b: Tensor) -> np.ndarray:
    """One minus the cosine of rows (N, D), (N,)."""
    return (1 - (_unit(a) * _unit(b)).sum(1)).clamp(min=0).numpy()


def _unit(rows: Tensor) -> Tensor:
    return nn.functional.normalize(rows, dim=1)
