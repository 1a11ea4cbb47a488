"""Generator and decoder: from requests and the states of their prompts to images; a broken one is an error and never an image."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from snoopi_rt.bundle.bundle import Bundle, Variant
from snoopi_rt.bundle.manifest import require
from snoopi_rt.engines import known_engine
from snoopi_rt.engines.base import Engine
from snoopi_rt.errors import OutputError, how_to_find_node
from snoopi_rt.request import Request
from snoopi_rt.runtime.deadline import Deadline
from snoopi_rt.runtime.inputs import States, generator_inputs, in_batches
from snoopi_rt.runtime.lazy_engine import LazyEngine
from snoopi_rt.runtime.tiling import decode_tiled


class ImageStages:
    """The generator and the decoder of a bundle on an engine; `open_engine` opens a graph."""

    def __init__(self, bundle: Bundle, variants: Mapping[str, Variant], engine: str, open_engine: Callable[[str], Engine]) -> None:
        self._bundle, self._engine = bundle, engine
        self.generator, self.decoder = LazyEngine(lambda: open_engine("generator")), LazyEngine(lambda: open_engine("decoder"))
        self.max_batch, self._max_decoded = (
            min(bundle.max_batch, variants[graph].max_batch or bundle.max_batch) for graph in ("generator", "decoder")
        )
        self._longest = bundle.text.max_tokens if known_engine(engine).prefers_fixed_shapes else None

    @property
    def provider(self) -> str:
        """What both really run on, in the words of the engine's package."""
        return ", ".join(dict.fromkeys([self.generator.open().provider, self.decoder.open().provider]))

    def open(self) -> None:
        """Opens both, instead of when they are first needed."""
        self.generator.open()
        self.decoder.open()

    def release(self) -> None:
        """Frees both until they are needed again."""
        self.generator.release()
        self.decoder.release()

    def draw(
        self,
        requests: Sequence[Request],
        states: Mapping[str, States],
        size: tuple[int, int],
        timings: dict[str, float],
        deadline: Deadline,
    ) -> np.ndarray:
        """The images (n, H, W, 3) uint8 of the requests, in batches as large as the variants take. Adds to `timings`.

        Raises OutputError for NaN, infinity and an image of one value, BundleError for an output of another shape, Cancelled.
        """
        batches = in_batches(requests, states, self.generator.open().inputs, self.max_batch)
        return np.concatenate([self._batch(batch, states, size, timings, deadline) for batch in batches])

    def _batch(
        self, batch: list[Request], states: Mapping[str, States], size: tuple[int, int], timings: dict[str, float], deadline: Deadline
    ) -> np.ndarray:
        deadline.check("generator")
        with timed(timings, "generator"):
            inputs, shape = self.generator.open().inputs, self._bundle.latent
            latent: Any = self.generator(**generator_inputs(batch, states, inputs, shape, size, self._longest))["latent"]
            rows, columns = (side // shape.factor for side in size)
            self._require_shape("generator", latent, (len(batch), shape.channels, rows, columns))
            if isinstance(latent, np.ndarray):
                self._refuse_broken(batch, latent)
        deadline.check("decoder")
        with timed(timings, "decoder"):
            images = self._decode(latent)
            if not isinstance(latent, np.ndarray):  # on a device, which would have waited for this before the decoder
                self._refuse_broken(batch, np.asarray(latent))
            # NaN becomes one value as uint8. A decoder's noise makes a plain image that is meant practically impossible.
            self._refuse(batch, images.min(axis=(1, 2, 3)) == images.max(axis=(1, 2, 3)), "decoder", "one value for all pixels")
            return images

    def _decode(self, latent: np.ndarray) -> np.ndarray:
        """The images of latents, as many at once as the decoder's variant takes, in tiles if the bundle wants that.

        Latents that lie on a device stay there if they are decoded as they are.
        """
        tile, factor = self._bundle.tile, self._bundle.latent.factor

        def decode(part: np.ndarray) -> np.ndarray:
            image = np.asarray(self.decoder(latent=part)["image"])
            rows, columns = (side * factor for side in part.shape[2:])
            self._require_shape("decoder", image, (len(part), rows, columns, 3))
            return image

        if tile is None and len(latent) <= self._max_decoded:
            return decode(latent)
        latent = np.asarray(latent)
        parts = [latent[start : start + self._max_decoded] for start in range(0, len(latent), self._max_decoded)]
        if tile is None:
            images = [decode(part) for part in parts]
        else:
            images = [decode_tiled(decode, part, tile.size, tile.overlap, factor) for part in parts]
        return np.concatenate(images)

    def _require_shape(self, graph: str, array: Any, shape: tuple[int, ...]) -> None:
        """Raises BundleError if the array has another shape than the bundle promises."""
        require(tuple(array.shape) == shape, f"{graph} of bundle {self._bundle.name!r} gave {tuple(array.shape)} but {shape} is promised")

    def _refuse_broken(self, batch: list[Request], latent: np.ndarray) -> None:
        self._refuse(batch, ~np.isfinite(latent).all(axis=(1, 2, 3)), "generator", "NaN or infinity")

    def _refuse(self, batch: list[Request], broken: np.ndarray, graph: str, output: str) -> None:
        """Raises OutputError if one of the batch is broken, (B,) bool; graph and output: what gave what."""
        if broken.any():
            seeds = ", ".join(str(request.seed) for request, bad in zip(batch, broken, strict=True) if bad)
            what = f"{graph} gave {output} on engine {self._engine!r} for seed {seeds}"
            raise OutputError(f"{what}: no image was made; {how_to_find_node(graph, self._engine)}")


@contextmanager
def timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the seconds of its block to those of the stage."""
    start = time.perf_counter()
    yield
    timings[stage] += time.perf_counter() - start
