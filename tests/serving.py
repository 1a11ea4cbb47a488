"""The HTTP server, in a thread or as a process, for tests that talk to it."""

import base64
import io
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from PIL import Image

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.engines.fake import FakeEngine
from snoopi_rt.pipeline import Pipeline

pytest.importorskip("fastapi", reason="the extra serve is not installed")
httpx = pytest.importorskip("httpx")
import uvicorn  # noqa: E402

from snoopi_rt.server import connection  # noqa: E402
from snoopi_rt.server.app import application  # noqa: E402
from snoopi_rt.server.settings import Settings  # noqa: E402


@contextmanager
def served(settings: Settings) -> Iterator[str]:
    """The address of a server that runs meanwhile."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(application(settings), "127.0.0.1", port, http=connection.connections(), log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    address = f"http://127.0.0.1:{port}"
    while "loading" in httpx.get(f"{address}/readyz").text:
        time.sleep(0.01)
    try:
        yield address
    finally:
        server.should_exit = True
        thread.join()


DRAW = "/v1/images/generations"


@contextmanager
def command(*arguments: str, **streams: Any) -> Iterator[tuple[subprocess.Popen, str]]:
    """`snoopi-rt serve` as a process, and its address; it is over afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "snoopi_rt", "serve", "--port", str(port), "--engine", "cpu", *arguments]
    process = subprocess.Popen(words, **{"stderr": subprocess.PIPE, "encoding": "utf-8", **streams})
    address = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        try:
            return process.poll() is not None or httpx.get(f"{address}/readyz").status_code == 200
        except httpx.TransportError:  # it does not listen yet, or ends just now
            return False

    try:
        eventually(ready, 30)
        yield process, address
    finally:
        process.kill()
        process.communicate()


class Slow:
    """The tiny bundle on fake engines whose generator waits for `go` and counts the images of its calls."""

    def __init__(self, bundle: Bundle, fakes: dict[str, FakeEngine]) -> None:
        self.go, self.calls = threading.Event(), []

        def generator(**arrays: np.ndarray) -> dict[str, np.ndarray]:
            self.calls.append(len(arrays["noise"]))
            assert self.go.wait(20)
            return fakes["generator"](**arrays)

        engines = {**fakes, "generator": FakeEngine(generator, fakes["generator"].inputs, fakes["generator"].outputs)}
        self.pipe = Pipeline(bundle, engines.__getitem__, "cpu", cache=Cache())

    def open(self) -> Pipeline:
        """The pipeline; its warm-up does not wait."""
        self.go.set()
        self.pipe.warmup()
        self.calls.clear()
        self.go.clear()
        opened = self.pipe
        opened.warmup = lambda: opened  # type: ignore[method-assign]
        return opened


def pictures(answer: dict[str, Any]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(each["b64_json"])))) for each in answer["data"]])


def eventually(condition: Callable[[], Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
