"""The server's application on Ray Serve: one process that answers HTTP, and for each bundle as many workers as requested."""

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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

from snoopi_rt.batch.ray import Workers, original_error, start_ray
from snoopi_rt.errors import BundleError, Cancelled, InputError, SnoopiError
from snoopi_rt.pipeline import Pipeline
from snoopi_rt.request import Request
from snoopi_rt.result import Result
from snoopi_rt.server.addresses import url
from snoopi_rt.server.app import application, log_opened
from snoopi_rt.server.batcher import Observe, ServedModel
from snoopi_rt.server.logs import FLUSH_SECONDS, MAX_BUFFERED_LINES, LineHandler, log, log_event, write_logs
from snoopi_rt.server.models import none_served, open_here
from snoopi_rt.server.serve import GRACE, check_address
from snoopi_rt.server.settings import Settings

GONE = (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError)
"""A replica has died, or there is none at the moment."""
PAUSE = 0.2
"""Seconds before another replica is asked."""
NAME = "snoopi-rt"
LOG = "log"
"""The name of the actor LogLines."""
END = ""
"""Marks the end of the log."""
PATIENCE = 10.0
"""Seconds between reports while processes start."""
UPSCALE = 5.0
"""Seconds of too many requests before another replica is started; Ray's default is 30."""
MAX_OPEN_REQUESTS = 10_000
"""Requests that the HTTP side has open at once: the queues of the replicas are the limit."""


class Replica:
    """A process that draws one bundle: the server's own batcher."""

    async def __init__(self, name: str, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        self._model: ServedModel | None = None
        try:
            self._model = await open_here(name, settings, lambda images, timings: None)
        except SnoopiError as error:  # reported when asked: Ray would retry forever, and other bundles would not be served
            self._error = error

    async def engine(self) -> str:
        """What it draws on."""
        return self._opened().pipe.engine

    async def draw(self, images: list[Request], size: tuple[int, int], timeout: float, truncate: bool) -> Result:
        """See ServedModel."""
        return await self._opened().draw(images, size, timeout, truncate)

    def _opened(self) -> ServedModel:
        if self._model is None:
            raise self._error
        return self._model


class Remote:
    """A ServedModel whose images other processes draw. `pipe` is never opened: it only knows what can be drawn."""

    def __init__(self, name: str, pipe: Pipeline, handle: DeploymentHandle) -> None:
        self.name, self.pipe, self._handle = name, pipe, handle
        self.waiting = 0
        self.pace = None  # other processes draw

    async def draw(self, images: list[Request], size: tuple[int, int], timeout: float, truncate: bool) -> Result:
        """See ServedModel. If a process dies, another draws its images: the seed makes them the same."""
        end = time.monotonic() + timeout
        self.waiting += len(images)
        try:
            while (rest := end - time.monotonic()) > 0:
                try:
                    return await self._handle.draw.remote(images, size, rest, truncate)
                except GONE:
                    await asyncio.sleep(PAUSE)
                except RayTaskError as error:
                    if not isinstance(error.cause, SnoopiError):
                        log.error("a process that draws %s: %s", self.name, error)  # with the traceback
                    raise original_error(error) from None
            raise Cancelled("timed out: no worker is left to draw")
        finally:
            self.waiting -= len(images)

    def close(self) -> None:
        """Ray ends its processes itself."""
        self.pipe.close()


async def remote(handles: dict[str, DeploymentHandle], name: str, settings: Settings, _: Observe) -> ServedModel:
    """A model that replicas draw; only they could observe its calls. Raises what opening the bundle raises, here or there."""
    try:
        engine = await handles[name].engine.remote() if name in handles else "auto"
    except RayTaskError as error:
        raise original_error(error) from None
    pipe = await asyncio.to_thread(settings.models[name], engine=engine, low_memory=True)
    return Remote(name, pipe, handles[name])


class LogLines:
    """An actor that carries log lines from the process that answers HTTP to that of the command, which writes them."""

    def __init__(self) -> None:
        self._lines: asyncio.Queue[str] = asyncio.Queue(MAX_BUFFERED_LINES)

    async def add(self, line: str) -> None:
        """Drops the line if nobody takes them."""
        with suppress(asyncio.QueueFull):
            self._lines.put_nowait(line)

    async def take(self) -> list[str]:
        """All waiting lines; waits for the first."""
        lines = [await self._lines.get()]
        while not self._lines.empty():
            lines.append(self._lines.get_nowait())
        return lines


class LinesToCommand(logging.Handler):
    """Sends the log's lines to LogLines, except Ray's own messages."""

    def __init__(self) -> None:
        super().__init__()
        self._lines = ray.get_actor(LOG, namespace=NAME)
        self.addFilter(lambda record: not record.name.startswith("ray"))

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.add.remote(self.format(record))


@contextmanager
def lines_of_others(handler: LineHandler) -> Iterator[None]:
    """Inside the block, writes the lines that other processes log."""
    lines: Any = ray.remote(LogLines).options(name=LOG, namespace=NAME, num_cpus=0).remote()

    def write() -> None:
        with suppress(RayError):
            while True:
                for line in ray.get(lines.take.remote()):
                    if line == END:
                        return
                    handler.add(line)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield
    finally:
        lines.add.remote(END)
        thread.join(FLUSH_SECONDS)
        handler.flush()


def deployed(settings: Settings, workers: Workers, address: str, log_json: bool) -> serve.Application:
    """The application for `serve.run(..., name=NAME)` in `lines_of_others`. Bundles must lie in the same folders on every machine.

    Raises BundleError if no bundle can be opened.
    """
    deployment: Any = serve.deployment  # its types know the decorator only
    broken = {name: error for name in settings.models if (error := _broken(settings, name)) is not None}
    whole = [name for name in settings.models if name not in broken]
    if not whole:
        raise none_served(broken)

    def build() -> FastAPI:
        write_logs(log_json, LinesToCommand())
        handles = {name: serve.get_deployment_handle(_deployment(name), app_name=NAME) for name in whole}
        return application(settings, partial(remote, handles), partial(log_opened, address=address))

    replicas = [
        deployment(Replica)
        .options(
            name=_deployment(name),
            # More than its queue takes: any excess is refused there and does not wait here.
            max_ongoing_requests=settings.queue + settings.max_batch + 1,
            # Twice what is drawn together: one batch is drawn while the next one gathers.
            autoscaling_config={
                "min_replicas": workers.min,
                "max_replicas": workers.max,
                "target_ongoing_requests": 2 * settings.max_batch,
                "upscale_delay_s": UPSCALE,
            },
            ray_actor_options={"num_cpus": workers.cpus, "num_gpus": workers.gpus},
            graceful_shutdown_timeout_s=max(GRACE, settings.timeout),
        )
        .bind(name, replace(settings, key=None))
        for name in whole
    ]
    # One, because images that are returned as URLs are in its memory; it draws nothing, so no CPU is reserved for it.
    front = deployment(serve.ingress(build)()).options(
        name="http",
        max_ongoing_requests=MAX_OPEN_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=max(GRACE, settings.timeout),
    )
    return front.bind(*replicas)


def serve_on_ray(settings: Settings, workers: Workers, host: str, port: int, log_json: bool = True) -> None:
    """Serves until a signal, on the cluster at $RAY_ADDRESS, or else on a local one that ends with the command.

    Raises InputError if the address cannot be used, BundleError if no bundle can be opened, EngineError if Ray cannot start.
    """
    host = check_address(host, settings.key)
    log_handler = LineHandler(2)
    write_logs(log_json, log_handler)
    start_ray()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        with lines_of_others(log_handler):
            try:
                _start(host, port)
                with report_waiting():
                    serve.run(deployed(settings, workers, url(host, port, settings.root_path), log_json), name=NAME)
                threading.Event().wait()
            finally:
                serve.shutdown()
    except KeyboardInterrupt:
        pass
    finally:
        ray.shutdown()


def _start(host: str, port: int) -> None:
    try:
        serve.start(http_options=HTTPOptions(host=host, port=port))
    except (RayError, RuntimeError) as error:
        raise InputError(f"http://{host}:{port} cannot be served by Ray: is the port in use?") from error


@contextmanager
def report_waiting() -> Iterator[None]:
    """Logs every few seconds what the cluster has not started yet, and why: it may never have enough CPUs or GPUs."""
    done = threading.Event()

    def report() -> None:
        while not done.wait(PATIENCE):
            free = {name: ray.available_resources().get(name, 0) for name in ("CPU", "GPU")}
            for app in serve.status().applications.values():
                for name, deployment in app.deployments.items():
                    if deployment.status != "HEALTHY":
                        log_event("waiting", deployment=name, reason=deployment.message or deployment.status, free=free)

    threading.Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _broken(settings: Settings, name: str) -> str | None:
    """Why a bundle cannot be opened, or None; no process is started for such a bundle, and the server reports it."""
    try:
        settings.models[name](low_memory=True).close()
    except BundleError as error:
        return str(error)
    except SnoopiError:  # an engine that is not on this machine may be on the others
        pass
    return None


def _deployment(model: str) -> str:
    return f"draws {model}"
