"""What `Pipeline.generate` returns: images, and what is needed to make each of them again."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from snoopi_rt import __version__

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, repr=False)
class Result:
    """Images (n, H, W, 3) uint8 and, image by image, what made them; `timings` are seconds by stage, and in `total`.

    `provider` is what the engine really ran on, in the words of its package; `precision` is what `load` takes to run the same variants;
    `warned` has a line for each prompt that asks for what the model does not know.
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
    warned: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        height, width = self.images.shape[1:3]
        prompt = self.prompts[0] if len(self.prompts[0]) <= 40 else f"{self.prompts[0][:37]}..."
        prompts = repr(prompt) + (f" and {count - 1} more" if (count := len(dict.fromkeys(self.prompts))) > 1 else "")
        seeds = f"seed {self.seeds[0]}" + (f" to {self.seeds[-1]}" if len(self) > 1 else "")
        return f"<Result: {len(self)} of {width}x{height}, {prompts}, {seeds}, {self.engine}, {self.timings['total']:.3f} s>"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why these images may not show what was asked for, a line a reason."""
        return tuple(dict.fromkeys(self.warned[prompt] for prompt in self.prompts if prompt in self.warned))

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the image, or all of them in a grid."""
        from snoopi_rt.image import encode, grid

        return encode(grid(self.images, math.ceil(math.sqrt(len(self)))), "png", self.metadata(0) if len(self) == 1 else {})

    def save(self, path: str | Path) -> list[Path]:
        """Writes the images, each with what makes it again inside, and returns their paths; a file of that name is replaced.

        `path` is that of one image; of several each is called NAME-SEED. In a folder (it is one, or ends in a slash) they are named after
        prompt and seed, and replace nothing. Raises InputError for an ending that is no image's, OutputError for what cannot be written.
        """
        from snoopi_rt import image
        from snoopi_rt.image_names import image_paths, is_folder

        paths = image_paths(path, None, self.prompts, self.seeds, self.scales)
        taken: image.Taken = "count" if is_folder(path) else "replace"
        return [image.save(self.images[i], each, self.metadata(i), taken) for i, each in enumerate(paths)]

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
