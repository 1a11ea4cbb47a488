"""What `Pipeline.generate` returns: images, and what is needed to make each of them again."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from snoopi_rt import __version__
from snoopi_rt.errors import InputError
from snoopi_rt.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, repr=False)
class Result:
    """Images, and the requests that they were drawn from. `result[2:5]` is the Result of some of them, and a loop gives one per image."""

    images: np.ndarray
    """uint8 (n, H, W, 3)."""
    requests: tuple[Request, ...]
    """One per image, in order."""
    timings: dict[str, float]
    """Seconds by stage, and in `total`, of the call that drew these images and maybe others."""
    engine: str
    provider: str
    """What the engine really ran on, in the words of its package."""
    precision: str
    """What `load` takes to run the same variants."""
    bundle: str
    bundle_hash: str
    truncate: bool
    """Whether prompts that are too long were to be cut. `Pipeline.check` tells which are: it raises for them."""
    warned: Mapping[str, str] = field(default_factory=dict)
    """A line for each prompt that asks for something that the model does not know."""

    def __repr__(self) -> str:
        height, width = self.images.shape[1:3]
        prompt = self.requests[0].prompt
        prompt = prompt if len(prompt) <= 40 else f"{prompt[:37]}..."
        others = len({request.prompt for request in self.requests}) - 1
        prompts = repr(str(prompt)) + (f" and {others} more" if others else "")
        low, high = min(self.seeds), max(self.seeds)
        seeds = f"seed {low}" if low == high else f"seeds {low} to {high}"
        count = "1 image" if len(self) == 1 else f"{len(self)} images"
        return f"<Result: {count} of {width}x{height}, {prompts}, {seeds}, {self.engine}, {self.timings['total']:.3f} s>"

    @property
    def seeds(self) -> list[int]:
        """The seed of each image."""
        return [request.seed for request in self.requests]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why these images may not show what was asked for, one line per reason."""
        return tuple(dict.fromkeys(self.warned[request.prompt] for request in self.requests if request.prompt in self.warned))

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

        prompts, scales = zip(*((request.prompt, request.negative_scale) for request in self.requests), strict=True)
        paths = image_paths(path, None, prompts, self.seeds, scales)
        if_exists: image.IfExists = "count" if is_folder(path) else "replace"
        return [image.save(self.images[i], path, self.metadata(i), if_exists) for i, path in enumerate(paths)]

    def encode(self, format: str = "png", quality: int = 95) -> list[bytes]:
        """The images as bytes of files, each with what makes it again inside. format: "png", "jpeg" or "webp"; quality: 0 to 100, of the
        latter two. Raises InputError for another format, OutputError for what the format cannot hold.
        """
        from snoopi_rt import image

        if format not in image.FORMATS.values():
            raise InputError(f"unknown image format {format!r}, choose from {', '.join(dict.fromkeys(image.FORMATS.values()))}")
        return [image.encode(self.images[i], format, self.metadata(i), quality) for i in range(len(self))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | slice) -> "Result":
        """The Result of one image, or of several."""
        part = index if isinstance(index, slice) else slice(index, index + 1 or None)
        requests = self.requests[part]
        if not requests:
            raise IndexError(f"no image {index} among {len(self)}")
        return replace(self, images=self.images[part], requests=requests)

    def __iter__(self) -> Iterator["Result"]:
        return (self[i] for i in range(len(self)))

    def pil(self) -> "list[Image]":
        """The images as Pillow images."""
        from PIL import Image

        return [Image.fromarray(image) for image in self.images]

    def metadata(self, index: int) -> dict[str, str]:
        """What is needed to make image `index` again, as text; what was not given is absent."""
        height, width = self.images.shape[1:3]
        values = {
            **vars(self.requests[index]),
            "size": f"{width}x{height}",
            "truncate": "yes" if self.truncate else None,
            "engine": self.engine,
            "precision": self.precision,
            "bundle": self.bundle,
            "bundle_hash": self.bundle_hash,
            "snoopi_rt": __version__,
        }
        return {key: str(value) for key, value in values.items() if value is not None}
