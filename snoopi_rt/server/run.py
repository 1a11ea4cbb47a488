"""The application under uvicorn, whose connections must not stand half said."""

import asyncio
import ipaddress
import logging
import math
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from snoopi_rt.engines.base import InputError
from snoopi_rt.server.app import Settings, application

HEADERS = 10.0
"""Seconds in which a connection must have sent a request's headers, and in which it must read something of an answer."""
LARGEST = 2**20
"""Bytes of one request with its headers; the application's limit of a body is smaller."""
GRACE = 30.0
"""Seconds that accepted requests may take after a signal to stop, at least: else as long as any request."""


class Impatient(HttpToolsProtocol):
    """Closes a connection that begins a request and does not go on, says too much, or does not read its answer: else some hundred of them
    would hold the server."""

    _patience: asyncio.TimerHandle | None = None
    _taken = 0

    def on_message_begin(self) -> None:
        self._taken = 0
        super().on_message_begin()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.loop.call_later(HEADERS, self._unread, self.transport.get_write_buffer_size())

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        self._taken += len(data)
        if self._taken > LARGEST:
            self.transport.abort()
            return
        super().data_received(data)
        if self._asks():
            self._go_on()
        elif self._patience is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._go_on()
        super().connection_lost(exc)

    def _asks(self) -> bool:
        """A request's headers are complete, and it is not answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._patience = self.loop.call_later(HEADERS, self._close)

    def _go_on(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _unread(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left and left == before:
            self.transport.abort()
        elif left:
            self.loop.call_later(HEADERS, self._unread, left)

    def _close(self) -> None:
        self._patience = None
        if not self._asks():
            self.transport.close()


def check_address(host: str, key: str | None) -> None:
    """Returns for an address that only this machine reaches, or with a key; raises InputError for any other."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local and key is None:
        raise InputError(f"--host {host} is for others too: give --api-key-file FILE or $SNOOPI_RT_API_KEY")


def serve(settings: Settings, host: str, port: int) -> None:
    """Serves until a signal; requests that were accepted are finished. Raises InputError where the address cannot be used."""
    check_address(host, settings.key)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = uvicorn.Config(
        application(settings),
        host,
        port,
        http=Impatient,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=math.ceil(max(GRACE, settings.timeout)),
    )
    server = uvicorn.Server(config)
    try:
        server.run()
    except SystemExit as error:  # uvicorn has said why
        raise InputError(f"http://{host}:{port} cannot be served: is the port in use?") from error
