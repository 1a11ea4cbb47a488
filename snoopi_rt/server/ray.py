"""The server's application on Ray Serve: one process that answers HTTP, and for each bundle as many as wanted that draw."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from snoopi_rt.batch.ray import Workers, known, start_ray
from snoopi_rt.errors import BundleError, Cancelled, InputError, SnoopiError
from snoopi_rt.pipeline import Pipeline
from snoopi_rt.request import Request
from snoopi_rt.result import Result
from snoopi_rt.server.addresses import url
from snoopi_rt.server.app import application
from snoopi_rt.server.batcher import Drawing
from snoopi_rt.server.logs import log_event, write_logs
from snoopi_rt.server.models import none_served, open_here
from snoopi_rt.server.serve import GRACE, check_address
from snoopi_rt.server.settings import Settings

GONE = (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError)
"""A replica died, or there is none at the moment."""
PAUSE = 0.2
"""Seconds before another is asked."""
NAME = "snoopi-rt"
PATIENCE = 10.0
"""Seconds without a word while processes start."""
UPSCALE = 5.0
"""Seconds of more requests than the processes should have before there is another; Ray's own are 30."""
FRONT = 10_000
"""Requests that the HTTP side has open at once: the queues of the replicas are the limit."""


class Replica:
    """A process that draws one bundle: the server's own batcher."""

    async def __init__(self, name: str, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        self._drawing: Drawing | None = None
        try:
            self._drawing = await open_here(name, settings, lambda images: None)
        except SnoopiError as error:  # told when asked: Ray would try again for ever, and other bundles would not be served
            self._error = error

    async def engine(self) -> str:
        """What it draws on."""
        return self._opened().pipe.engine

    async def draw(self, images: list[Request], size: tuple[int, int], timeout: float, truncate: bool) -> Result:
        """See Drawing."""
        return await self._opened().draw(images, size, timeout, truncate)

    def _opened(self) -> Drawing:
        if self._drawing is None:
            raise self._error
        return self._drawing


class Remote:
    """A Drawing whose images other processes draw. `pipe` is never opened: it says what can be asked."""

    def __init__(self, name: str, pipe: Pipeline, handle: DeploymentHandle, observe: Callable[[int], None]) -> None:
        self.name, self.pipe, self._handle, self._observe = name, pipe, handle, observe
        self.waiting = 0
        self.pace = None  # other processes draw

    async def draw(self, images: list[Request], size: tuple[int, int], timeout: float, truncate: bool) -> Result:
        """See Drawing. What a process that dies was drawing another draws: the seed makes it the same image."""
        end = time.monotonic() + timeout
        self.waiting += len(images)
        try:
            while (rest := end - time.monotonic()) > 0:
                try:
                    result = await self._handle.draw.remote(images, size, rest, truncate)
                except GONE:
                    await asyncio.sleep(PAUSE)
                    continue
                except RayTaskError as error:
                    raise known(error) from None
                self._observe(len(images))
                return result
            raise Cancelled("the timeout is over, and no process that draws is left")
        finally:
            self.waiting -= len(images)

    def close(self) -> None:
        """Ray ends its processes itself."""
        self.pipe.close()


async def remote(handles: dict[str, DeploymentHandle], name: str, settings: Settings, observe: Callable[[int], None]) -> Drawing:
    """A model that replicas draw. Raises what opening the bundle raises, here or there."""
    try:
        engine = await handles[name].engine.remote() if name in handles else "auto"
    except RayTaskError as error:
        raise known(error) from None
    pipe = await asyncio.to_thread(settings.models[name], engine=engine, low_memory=True)
    return Remote(name, pipe, handles[name], observe)


def deployed(settings: Settings, workers: Workers) -> serve.Application:
    """The application for `serve.run(..., name=NAME)`. Bundles must lie in the same folders on every machine.

    Raises BundleError where no bundle is whole.
    """
    deployment: Any = serve.deployment  # its types know the decorator only
    broken = {name: error for name in settings.models if (error := _broken(settings, name)) is not None}
    whole = [name for name in settings.models if name not in broken]
    if not whole:
        raise none_served(broken)

    def build() -> FastAPI:
        handles = {name: serve.get_deployment_handle(_deployment(name), app_name=NAME) for name in whole}
        return application(settings, partial(remote, handles))

    drawing = [
        deployment(Replica)
        .options(
            name=_deployment(name),
            # More than its queue takes: what is too much is refused there, and does not wait here.
            max_ongoing_requests=settings.queue + settings.max_batch + 1,
            # Twice what is drawn together: one batch is drawn while the next one gathers.
            autoscaling_config={
                "min_replicas": workers.least,
                "max_replicas": workers.most,
                "target_ongoing_requests": 2 * settings.max_batch,
                "upscale_delay_s": UPSCALE,
            },
            ray_actor_options={"num_cpus": workers.cpus, "num_gpus": workers.gpus},
            graceful_shutdown_timeout_s=max(GRACE, settings.timeout),
        )
        .bind(name, replace(settings, key=None))
        for name in whole
    ]
    # One, because images that are given as addresses are in its memory; it draws nothing, and no CPU is reserved for it.
    front = deployment(serve.ingress(build)()).options(
        name="http",
        max_ongoing_requests=FRONT,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=max(GRACE, settings.timeout),
    )
    return front.bind(*drawing)


def serve_on_ray(settings: Settings, workers: Workers, host: str, port: int, log_json: bool = True) -> None:
    """Serves until a signal, on the cluster of $RAY_ADDRESS, else on one of this machine that ends with it.

    Raises InputError where the address cannot be used, BundleError where no bundle is whole, EngineError where Ray cannot start.
    """
    host = check_address(host, settings.key)
    write_logs(log_json)
    start_ray()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        _start(host, port)
        with waiting_told():
            serve.run(deployed(settings, workers), name=NAME)
        address = url(host, port, settings.root_path)
        log_event("ready", f"serving on {address} (Ctrl-C ends it)", models=list(settings.models), address=address)
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()
        ray.shutdown()


def _start(host: str, port: int) -> None:
    try:
        serve.start(http_options=HTTPOptions(host=host, port=port))
    except (RayError, RuntimeError) as error:
        raise InputError(f"http://{host}:{port} cannot be served by Ray: is the port in use?") from error


@contextmanager
def waiting_told() -> Iterator[None]:
    """Says every few seconds what the cluster has not started yet, and why: it may lack CPUs or GPUs for ever."""
    done = threading.Event()

    def talk() -> None:
        while not done.wait(PATIENCE):
            free = {name: ray.available_resources().get(name, 0) for name in ("CPU", "GPU")}
            for app in serve.status().applications.values():
                for name, found in app.deployments.items():
                    if found.status != "HEALTHY":
                        log_event("waiting", deployment=name, reason=found.message or found.status, free=free)

    threading.Thread(target=talk, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _broken(settings: Settings, name: str) -> str | None:
    """Why a bundle cannot be opened: for such a one no process is started. The server tells it."""
    try:
        settings.models[name](low_memory=True).close()
    except BundleError as error:
        return str(error)
    except SnoopiError:  # an engine that is not on this machine may be on the others
        pass
    return None


def _deployment(model: str) -> str:
    return f"draws {model}"
