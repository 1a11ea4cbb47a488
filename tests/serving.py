"""The HTTP server in a thread, for tests that talk to it."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

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
