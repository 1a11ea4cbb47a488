"""What `Pipeline.generate` returns: images, and what is needed to make each of them again."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from snoopi_rt import __version__

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Result:
    """Images (n, H, W, 3) uint8 and, image by image, what made them; `timings` are seconds by stage, and in `total`.

    `provider` is what the engine really ran on, in the words of its package; `precision` is what `load` takes to run the same builds.
    """

    images: np.ndarray
    prompts: list[str]
    negatives: list[str | None]
    scales: list[float | None]
    seeds: list[int]
    timings: dict[str, float]
    engine: str
    provider: str
    precision: str
    bundle: str
    bundle_hash: str
    truncated: bool

    def __len__(self) -> int:
        return len(self.images)

    def part(self, first: int, count: int) -> "Result":
        """That many of the images, from `first` on; the timings are those of all."""
        part = slice(first, first + count)
        return replace(
            self,
            images=self.images[part],
            prompts=self.prompts[part],
            negatives=self.negatives[part],
            scales=self.scales[part],
            seeds=self.seeds[part],
        )

    def split(self) -> "list[Result]":
        """A result for each image."""
        return [self.part(i, 1) for i in range(len(self))]

    def pil(self) -> "list[Image]":
        """The images as Pillow images."""
        from PIL import Image

        return [Image.fromarray(image) for image in self.images]

    def metadata(self, index: int) -> dict[str, str]:
        """What is needed to make image `index` again, as text; what was not given is absent."""
        height, width = self.images.shape[1:3]
        given = {
            "prompt": self.prompts[index],
            "negative_prompt": self.negatives[index],
            "negative_scale": self.scales[index],
            "seed": self.seeds[index],
            "size": f"{width}x{height}",
            "truncate": "yes" if self.truncated else None,
            "engine": self.engine,
            "precision": self.precision,
            "bundle": self.bundle,
            "bundle_hash": self.bundle_hash,
            "snoopi_rt": __version__,
        }
        return {key: str(value) for key, value in given.items() if value is not None}
