"""Prompt, negative prompt and seed to images: tokenize, text encoder, noise, generator, decoder.

Knows no formula, no backbone and no engine package: it feeds the inputs that the bundle's graphs list.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from snoopi_rt import __version__
from snoopi_rt.bundle import Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.choice import choose_engine
from snoopi_rt.engines import known_engine, load_engine
from snoopi_rt.engines.base import BundleError, Engine, OutputError
from snoopi_rt.prompts import PromptEncoder, States
from snoopi_rt.request import Request, image_size, integer, requests
from snoopi_rt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

EMBEDDED = Path(__file__).parent / "bundles" / "small"
STAGES = ("text_encoder", "generator", "decoder")


@dataclass(frozen=True)
class Result:
    """Images (n, H, W, 3) uint8 and, image by image, what made them; `timings` are seconds by stage, and in `total`.

    `provider` is what the engine really ran on, in the words of its package.
    """

    images: np.ndarray
    prompts: list[str]
    negatives: list[str | None]
    scales: list[float | None]
    seeds: list[int]
    timings: dict[str, float]
    engine: str
    provider: str
    precision: str | None
    bundle: str
    bundle_hash: str
    truncated: bool

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
            "size": f"{height}x{width}",
            "truncate": "yes" if self.truncated else None,
            "engine": self.engine,
            "precision": self.precision,
            "bundle": self.bundle,
            "bundle_hash": self.bundle_hash,
            "snoopi_rt": __version__,
        }
        return {key: str(value) for key, value in given.items() if value is not None}


class Pipeline:
    """A bundle on an engine. Many threads may call one pipeline; `snoopi_rt.load` makes it."""

    def __init__(
        self, bundle: Bundle, open_engine: Callable[[str], Engine], engine: str, precision: str | None = None, cache: Cache | None = None
    ) -> None:
        self.bundle, self.engine, self.precision = bundle, engine, precision
        self._generator, self._decoder = open_engine("generator"), open_engine("decoder")
        self.provider = ", ".join(dict.fromkeys([self._generator.provider, self._decoder.provider]))
        build = bundle.build("text_encoder", engine, precision)
        text = bundle.text
        self._encode = PromptEncoder(
            lambda: Tokenizer(bundle.folder / text.tokenizer.path, text.max_tokens, text.lowercase),
            lambda: open_engine("text_encoder"),
            tuple(spec.name for spec in build.outputs),
            f"{build.hash} {engine}",
            Cache() if cache is None else cache,
        )

    def generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str | None] | None = None,
        negative_scale: float | Sequence[float | None] | None = None,
        seed: int | Sequence[int | None] | None = None,
        n: int = 1,
        size: Sequence[int] | None = None,
        truncate: bool = False,
    ) -> Result:
        """The n images of each prompt, prompt by prompt; image i of a prompt uses seed + i, and no seed draws one.

        Prompt, negative, scale and seed may be lists of one length. `size` is (height, width); `truncate` cuts prompts that are too long.
        Raises InputError for what cannot be asked, OutputError where a stage gives NaN, infinity or a picture of one value.
        """
        start = time.perf_counter()
        asked = requests(prompt, negative_prompt, negative_scale, seed, n, self.bundle.guidance)
        size = image_size(size, self.bundle.sizes)
        timings = dict.fromkeys(STAGES, 0.0)
        with _timed(timings, "text_encoder"):
            texts = dict.fromkeys(text for request in asked for text in (request.prompt, request.negative) if text is not None)
            states = {text: self._encode(text, truncate) for text in texts}
        images = [self._images(batch, states, size, timings) for batch in self._batches(asked, states)]
        timings["total"] = time.perf_counter() - start
        return Result(
            images=np.concatenate(images),
            prompts=[request.prompt for request in asked],
            negatives=[request.negative for request in asked],
            scales=[request.scale for request in asked],
            seeds=[request.seed for request in asked],
            timings=timings,
            engine=self.engine,
            provider=self.provider,
            precision=self.precision,
            bundle=self.bundle.name,
            bundle_hash=self.bundle.hash,
            truncated=truncate,
        )

    __call__ = generate

    def warmup(self) -> Self:
        """Opens and runs all three stages once, so that the next image takes its usual time; returns the pipeline."""
        self.generate("warm", seed=0)
        return self

    def close(self) -> None:
        """Frees the engines; a later call raises EngineError."""
        for part in (self._encode, self._generator, self._decoder):
            part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _batches(self, asked: list[Request], states: dict[str, States]) -> Iterator[list[Request]]:
        """The requests in order, at most `max_batch` at once; a graph without masks gets prompts of one length at once."""
        names = {spec.name for spec in self._generator.inputs}

        def lengths(request: Request) -> tuple[int, int]:
            prompt, negative = _states(request, states)
            return (0 if "prompt_mask" in names else prompt.shape[1]), (0 if "negative_mask" in names else negative.shape[1])

        for _, group in groupby(asked, lengths):
            batch = list(group)
            for start in range(0, len(batch), self.bundle.max_batch):
                yield batch[start : start + self.bundle.max_batch]

    def _images(self, batch: list[Request], states: dict[str, States], size: tuple[int, int], timings: dict[str, float]) -> np.ndarray:
        with _timed(timings, "generator"):
            latent = np.asarray(self._generator(**self._feeds(batch, states, size))["latent"])
            self._refuse(batch, ~np.isfinite(latent).all(axis=(1, 2, 3)), "generator gave NaN or infinity")
        with _timed(timings, "decoder"):
            images = np.asarray(self._decoder(latent=latent)["image"])
            # NaN becomes one value as uint8. A decoder's noise makes a plain picture that is meant practically impossible.
            self._refuse(batch, images.min(axis=(1, 2, 3)) == images.max(axis=(1, 2, 3)), "decoder gave one value for all pixels")
            return images

    def _refuse(self, batch: list[Request], broken: np.ndarray, what: str) -> None:
        """Raises OutputError where one of the batch is broken, (B,) bool."""
        if broken.any():
            seeds = ", ".join(str(request.seed) for request, bad in zip(batch, broken, strict=True) if bad)
            raise OutputError(f"{what} on engine {self.engine!r} for seed {seeds}: no picture was made")

    def _feeds(self, batch: list[Request], states: dict[str, States], size: tuple[int, int]) -> dict[str, np.ndarray]:
        """The generator's inputs (design.md 4), those that it lists."""
        prompts, negatives = zip(*(_states(request, states) for request in batch), strict=True)
        prompt_states, prompt_mask = _padded(prompts)
        negative_states, negative_mask = _padded(negatives)
        shapes = {spec.name: spec.shape for spec in self._generator.inputs}
        latent, factor = self.bundle.latent, self.bundle.latent.factor
        shape = (latent.channels, size[0] // factor, size[1] // factor)
        steps = shapes["renoise"][1] or 0 if "renoise" in shapes else 0
        noise, renoise = zip(*(draw_noise(request.seed, shape, steps) for request in batch), strict=True)
        feeds: dict[str, Any] = {
            "noise": np.stack(noise),
            "renoise": np.stack(renoise),
            "prompt_states": prompt_states,
            "prompt_mask": prompt_mask,
            "negative_states": negative_states,
            "negative_mask": negative_mask,
            "negative_scale": np.array([0.0 if request.scale is None else request.scale for request in batch], np.float32),
        }
        if "prompt_pooled" in shapes:
            feeds["prompt_pooled"] = np.concatenate([states[request.prompt]["pooled"] for request in batch])
        if unknown := shapes.keys() - feeds.keys():
            raise BundleError(f"the generator takes {min(unknown)!r}, which this snoopi-rt cannot give")
        return {name: feeds[name] for name in shapes}


def load(
    bundle: str | Path | Bundle | None = None, engine: str = "auto", precision: str | None = None, threads: int | None = None
) -> Pipeline:
    """The pipeline of a bundle (a folder; None = the embedded one) on an engine.

    `engine` "auto" takes the fastest that `snoopi-rt bench` measured here, else `cpu`, then `openvino`; `precision` is one of the bundle's;
    `threads` bounds the CPU threads. Raises BundleError, EngineMissing, EngineError, InputError.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.load(EMBEDDED if bundle is None else bundle)
    cache = Cache()
    return open_pipeline(opened, choose_engine(opened, cache) if engine == "auto" else engine, precision, threads, cache)


def open_pipeline(bundle: Bundle, engine: str, precision: str | None, threads: int | None, cache: Cache) -> Pipeline:
    """The pipeline of a bundle on an engine by its own name, with its files in the cache. Raises as `load` does."""
    known_engine(engine)
    if threads is not None:
        integer("threads", threads, 1)

    def open_engine(graph: str) -> Engine:
        build = bundle.build(graph, engine, precision)
        return load_engine(engine, bundle.folder / build.files[0].path, build.precision, threads, cache.folder("engines"))

    return Pipeline(bundle, open_engine, engine, precision, cache)


def draw_noise(seed: int, shape: tuple[int, ...], steps: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The noise of one image and that of its `steps` later steps, float32 `shape` and (steps, *shape).

    RandomState is the one generator whose stream numpy promises never to change.
    """
    stream = np.random.RandomState(seed)
    return stream.standard_normal(shape).astype(np.float32), stream.standard_normal((steps, *shape)).astype(np.float32)


def _states(request: Request, states: dict[str, States]) -> tuple[np.ndarray, np.ndarray]:
    """The prompt's and the negative's states; no negative is one zero token, which scale 0 leaves without effect."""
    prompt = states[request.prompt]["states"]
    negative = np.zeros_like(prompt[:, :1]) if request.negative is None else states[request.negative]["states"]
    return prompt, negative


def _padded(states: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """States of (1, T, D) each as one (B, max T, D), zeros behind, and the mask of what is real (B, max T)."""
    longest = max(state.shape[1] for state in states)
    padded = np.zeros((len(states), longest, states[0].shape[2]), np.float32)
    mask = np.zeros((len(states), longest), bool)
    for row, state in enumerate(states):
        padded[row, : state.shape[1]] = state[0]
        mask[row, : state.shape[1]] = True
    return padded, mask


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[stage] += time.perf_counter() - start
