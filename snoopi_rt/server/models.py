"""The models of a server: opened while it already answers, looked up by name, described to clients."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from snoopi_rt.errors import BundleError, SnoopiError
from snoopi_rt.pipeline import EMBEDDED, Pipeline
from snoopi_rt.server import schema
from snoopi_rt.server.batcher import Batcher, Observe, ServedModel
from snoopi_rt.server.http_errors import HttpError
from snoopi_rt.server.settings import Settings

SLOW = 1.0
"""If the first image takes longer than these seconds, no second one is drawn to time it."""
OpenModel = Callable[[str, Settings, Observe], Awaitable[ServedModel]]


async def open_here(name: str, settings: Settings, observe: Observe) -> ServedModel:
    """A model that draws in this process. Raises what `load` does."""
    pipe, seconds_per_image = await asyncio.to_thread(_open_warm, settings.models[name])
    return Batcher(name, pipe, settings.batch_wait, settings.max_batch, settings.queue, observe, seconds_per_image)


class Models:
    """The models that are open, and why the others could not be opened."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._open: dict[str, ServedModel] = {}
        self._broken: dict[str, str] = {}
        self._created = int(time.time())

    async def open_all(self, open_model: OpenModel, metrics: Any) -> tuple[list[str], dict[str, str]]:
        """Opens one model after the other; returns the names of those that opened, and an error for each of the others."""
        for name in self._settings.models:
            try:
                self._open[name] = await open_model(name, self._settings, partial(metrics.called, name))
            except Exception as error:
                self._broken[name] = str(error) if isinstance(error, SnoopiError) else f"{type(error).__name__}: {error}"
                continue
            metrics.watch(self._open[name])
        return list(self._open), self._broken

    async def close(self) -> None:
        """Draws what is waiting and frees the models."""
        for model in self._open.values():
            await asyncio.to_thread(model.close)

    @property
    def is_ready(self) -> bool:
        """Whether the default model is open."""
        return next(iter(self._settings.models)) in self._open

    def status(self) -> dict[str, str]:
        """By name: "loading", "ready" or an error."""
        return {**dict.fromkeys(self._settings.models, "loading"), **self._broken, **dict.fromkeys(self._open, "ready")}

    def find(self, name: str | None) -> ServedModel:
        """The model of that name, by default the first. Raises HttpError for one that is unknown, broken or still loading."""
        names = self._settings.models
        if name is None or (name not in names and self._settings.lenient):
            name = next(iter(names))
        if name in self._open:
            return self._open[name]
        if name in self._broken:
            raise HttpError(503, f"model {name!r} cannot be served: {self._broken[name]}", "server_error")
        if name in names:
            raise HttpError(503, f"model {name!r} is still loading", "server_error", {"retry-after": "2"})
        raise HttpError(404, f"unknown model {name[:200]!r}, choose from {', '.join(names)}", "not_found_error")

    def describe(self, name: str | None) -> schema.Model:
        """The model of that name for clients. Raises HttpError as `find` does."""
        model = self.find(name)
        bundle = model.pipe.bundle
        scale = bundle.guidance.scale
        return schema.Model(
            id=model.name,
            created=self._created,
            sizes=[f"{width}x{height}" for height, width in bundle.sizes],
            negative_prompts=bundle.guidance.kind != "none",
            negative_scale={"min": scale.min, "max": scale.max, "default": scale.default},
            engine=model.pipe.engine,
            max_images=self._settings.max_images,
            seconds_per_image=model.pace,
            vocabulary=bundle.vocabulary and replace(bundle.vocabulary, related=None),
            examples=bundle.examples,
            embedded=bundle.folder == EMBEDDED,
        )

    def describe_all(self) -> list[schema.Model]:
        """The models that are open, the default first."""
        return [self.describe(name) for name in self._open]


def none_served(broken: dict[str, str]) -> BundleError:
    """The error of a server that has nothing to serve."""
    return BundleError(f"no bundle can be served: {'; '.join(f'{name}: {error}' for name, error in broken.items())}")


def _open_warm(open_pipeline: Callable[[], Pipeline]) -> tuple[Pipeline, float]:
    """The warm pipeline, and its seconds per image, measured on a second image unless that is slow."""
    pipe, seconds = open_pipeline().open(), 0.0
    for _ in range(2):
        start = time.monotonic()
        pipe.warmup()
        seconds = time.monotonic() - start
        if seconds > SLOW:
            break
    return pipe, seconds
