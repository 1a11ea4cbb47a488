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
from safetensors.torch import load_file
from torch import Tensor, nn

from snoopi_rt.export.evaluation.lite import Lite
from snoopi_rt.export.small_model.dataset import compose
from snoopi_rt.export.small_model.dataset.compose import Composer
from snoopi_rt.export.small_model.dataset.scene import DEFAULT_STYLE, Scene
from snoopi_rt.export.small_model.dataset.sprites import TRAINED, UNSEEN, DrawingSet, load_sprites
from snoopi_rt.export.small_model.dataset.vocabulary import things
from snoopi_rt.export.weights.files import fingerprint, save_tensors

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
        self.name, self._lite = network, Lite(network)
        self.hash = fingerprint(self._lite.weights)
        self._folder, self._sets = references, (*sets, UNSEEN)
        self.sets = [drawing.package for drawing in self._sets]
        self.names = [thing.name for thing in things()] if names is None else list(names)
        self._references: dict[str, Tensor] = {}

    @cached_property
    def composer(self) -> Composer:
        """Draws all things in all sets."""
        return Composer(load_sprites(self._sets, self.names))

    def features(self, pictures: np.ndarray | Sequence[np.ndarray]) -> Tensor:
        """(N, 1280) fp32 of pictures, (H, W, 3) uint8 each."""
        return torch.from_numpy(self._lite(pictures))

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
        made_by = (self.hash, fingerprint(*sorted(Path(compose.__file__).parent.glob("*.*"))), self.sets, side, tuple(scenes))
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


def ranks(features: Tensor, references: Tensor, own: Sequence[int]) -> np.ndarray:
    """How many references (M, D) are nearer to each row (N, D) by cosine than its own, (N,)."""
    similarity = _unit(features) @ _unit(references).T
    return (similarity > similarity.gather(1, torch.tensor(own, dtype=torch.int64)[:, None])).sum(1).numpy()


def cosine_distance(a: Tensor, b: Tensor) -> np.ndarray:
    """One minus the cosine of rows (N, D), (N,)."""
    return (1 - (_unit(a) * _unit(b)).sum(1)).clamp(min=0).numpy()


def _unit(rows: Tensor) -> Tensor:
    return nn.functional.normalize(rows, dim=1)
