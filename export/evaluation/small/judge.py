"""A judge of the small domain that nothing is trained towards: ImageNet features by EfficientNet-Lite2, against an unseen set of drawings.

Images and drawings are compared by the cosine of their pooled features, less the mean of the drawings': recognition asks whether the
thing's own Twemoji drawing is among the nearest.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from snoopi_rt.export.evaluation.lite import Lite
from snoopi_rt.export.evaluation.threads import in_threads
from snoopi_rt.export.small_model.dataset import compose, scene, sprites, vocabulary
from snoopi_rt.export.small_model.dataset.compose import Composer
from snoopi_rt.export.small_model.dataset.scene import DEFAULT_STYLE, Scene
from snoopi_rt.export.small_model.dataset.sprites import TRAINED, UNSEEN, DrawingSet, load_sprites
from snoopi_rt.export.small_model.dataset.vocabulary import things
from snoopi_rt.export.weights.files import fingerprint, save_tensors

TOP = 5
SIDE = 256  # pixels of scenes that are composed without chance
MANY = 64  # images whose features are worth keeping on disk
SHIPPED = Path(__file__).parent.parent
"""Where the features that a full evaluation needs come with snoopi-rt, as one evaluation left them in its `references`."""


class Judge:
    """Features of images, and the things that they show, by the drawings of a set that nothing is trained with.

    references: the folder that keeps the features of scenes that are not SHIPPED. names: the things that it tells apart; all by
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
        drawn_by = [Path(str(module.__file__)) for module in (compose, scene, sprites, vocabulary)]
        drawn_by += [drawing.path for drawing in (*TRAINED, UNSEEN)]
        self._made_by = f"{self.hash} {fingerprint(*drawn_by)} {SIDE}"
        self._features: dict[int, Tensor] = {}
        for folder in (SHIPPED, references):
            self._features |= self._kept(folder / self._file)

    @cached_property
    def composer(self) -> Composer:
        """Draws all things in all sets."""
        return Composer(load_sprites(self._sets, self.names))

    def features(self, pictures: np.ndarray | Sequence[np.ndarray]) -> Tensor:
        """(N, 1280) fp32 of images, (H, W, 3) uint8 each."""
        return torch.from_numpy(self._lite(pictures))

    def ranks(self, features: Tensor, names: Sequence[str]) -> np.ndarray:
        """How many drawings of other things are nearer than the named thing's own, (N,), for images on white; 0 is recognised at once."""
        # Each kind of image less its own mean drawing: what all of one set have in common tells nothing apart.
        drawings, reference = (self.of_scenes(self._scenes(style)) for style in (DEFAULT_STYLE, UNSEEN.style))
        own = [self.names.index(name) for name in names]
        return ranks(features - drawings.mean(0), reference - reference.mean(0), own)

    def ceiling(self) -> np.ndarray:
        """The ranks of the real drawings of the default set, one per thing."""
        return self.ranks(self.of_scenes(self._scenes(DEFAULT_STYLE)), self.names)

    def of_scenes(self, scenes: Sequence[Scene]) -> Tensor:
        """Features of scenes as they are composed without chance, (N, 1280): see `kept`."""
        return self.kept(list(map(repr, scenes)), lambda i: self.composer.draw(scenes[i], None, SIDE))

    def kept(self, names: Sequence[str], picture: Callable[[int], np.ndarray]) -> Tensor:
        """Features, (N, 1280), as fp16 holds them, of images that always look the same under their names; many are kept on disk.

        picture: draws that of a place, (H, W, 3) uint8; only those are drawn whose features are missing.
        """
        keys = list(map(_key, names))
        missing = {key: place for place, key in enumerate(keys) if key not in self._features}
        if missing:
            pictures = in_threads(picture, list(missing.values()), "real images", unit="image", few=50)
            self._features |= zip(missing, self.features(np.stack(pictures)).half(), strict=True)
        if len(missing) >= MANY:
            self._folder.mkdir(parents=True, exist_ok=True)
            tensors = {"scenes": torch.tensor(list(self._features)), "features": torch.stack(list(self._features.values()))}
            save_tensors(self._folder / self._file, tensors, {"made_by": self._made_by})
        return torch.stack([self._features[key] for key in keys]).float()

    @property
    def _file(self) -> str:
        return f"features-{self.name}.safetensors"

    def _kept(self, path: Path) -> dict[int, Tensor]:
        """What an evaluation by the same network and drawings left there; nothing of a damaged file, which is written anew."""
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("made_by") != self._made_by:
                    return {}
                return dict(zip(file.get_tensor("scenes").tolist(), file.get_tensor("features"), strict=True))
        except (FileNotFoundError, SafetensorError):
            return {}

    def _scenes(self, style: str) -> list[Scene]:
        return [Scene((name,), style=style) for name in self.names]


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


def ranks(features: Tensor, references: Tensor, own: Sequence[int]) -> np.ndarray:
    """How many references (M, D) are nearer to each row (N, D) by cosine than its own, (N,)."""
    similarity = _unit(features) @ _unit(references).T
    return (similarity > similarity.gather(1, torch.tensor(own, dtype=torch.int64)[:, None])).sum(1).numpy()


def cosine_distance(a: Tensor, b: Tensor) -> np.ndarray:
    """One minus the cosine of rows (N, D), (N,)."""
    return (1 - (_unit(a) * _unit(b)).sum(1)).clamp(min=0).numpy()


def _unit(rows: Tensor) -> Tensor:
    return nn.functional.normalize(rows, dim=1)
