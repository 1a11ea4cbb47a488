"""What measures share: weights, features that are kept on disk, the reference set."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from snoopi_rt.export.evaluation import towers
from snoopi_rt.export.evaluation.dinov2 import Dinov2
from snoopi_rt.export.evaluation.features import FeatureCache
from snoopi_rt.export.evaluation.image_sets import ImageSet
from snoopi_rt.export.evaluation.inception import Inception
from snoopi_rt.export.evaluation.lite import Lite
from snoopi_rt.export.evaluation.weight_files import Located, locate

ARCHITECTURES = {
    "hps-v2.0": towers.HPS,
    "hps-v2.1": towers.HPS,
    "clip-g14": towers.CLIP_G,
    "clip-b32": towers.CLIP_B,
    "clip-l14-336": towers.CMMD,
}


NETWORKS: dict[str, Callable[[Path, str], Any]] = {"inception": Inception, "dinov2": Dinov2, "lite2": partial(Lite, "lite2")}
"""By the name of their weights, what takes those and a device."""


@dataclass
class Context:
    """The weights on this machine, a cache of features, and the real images if there are any.

    architectures: those of OpenCLIP's weights. A network is loaded when its first features are not in the cache, and only one is in
    memory at a time.
    """

    located: Mapping[str, Located]
    cache: FeatureCache
    reference: ImageSet | None = None
    device: str = "cpu"
    architectures: Mapping[str, towers.Architecture] = field(default_factory=lambda: ARCHITECTURES)
    _open: tuple[str, Any] | None = None

    def image_features(self, weights: str, images: ImageSet) -> np.ndarray:
        """(N, D) of the images by the network of those weights."""

        def compute(places: range) -> np.ndarray:
            return self._on_images(weights)([images.open(i) for i in places])

        return self.cache.of_images(self._identity(weights), images, compute)

    def text_features(self, weights: str, texts: Sequence[str]) -> np.ndarray:
        """(N, D) of the texts by the text tower of those weights."""
        return self.cache.of_texts(self._identity(weights), texts, lambda places: self.network(weights).texts([texts[i] for i in places]))

    def network(self, weights: str) -> Any:
        """The network of those weights."""
        if self._open is None or self._open[0] != weights:
            self._open = None  # the one before is freed first
            path = self.located[weights].path
            if weights in self.architectures:
                network: Any = towers.Towers(self.architectures[weights], path, self.device)
            else:
                network = NETWORKS[weights](path, self.device)
            self._open = weights, network
        return self._open[1]

    def _on_images(self, weights: str) -> Callable[[Sequence[Image.Image]], np.ndarray]:
        network = self.network(weights)
        return network.images if weights in self.architectures else network  # type: ignore[no-any-return]

    def _identity(self, weights: str) -> str:
        return f"{weights} {self.located[weights].sha256} {self.architectures.get(weights, '')} {self.device} torch {torch.__version__}"


def open_context(names: Sequence[str], chosen: Mapping[str, str], out: Path, say: Callable[[str], None]) -> Context:
    """A context on this machine's GPU if it has one; weights are located as `locate` says, and features kept in the folder `out`."""
    return Context(locate(names, chosen, say), FeatureCache(out / "features"), device=measuring_device())


def measuring_device() -> str:
    """CUDA or the CPU: the measures were checked on no other."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def named(metric: str, used: int, protocol: int, unit: str) -> str:
    """The metric's name; if fewer were used than its protocol demands, that is part of the name."""
    return metric if used >= protocol else f"{metric} ({used:,} of {protocol:,} {unit})"
