"""HTTP connections under limits: what a client leaves half done, does not read, or sends ahead costs little, and not for long."""

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS = 10.0
"""Seconds in which a connection must have sent a request's headers, and in which it must read something of an answer."""
LARGEST, LARGEST_HEADERS = 2**18, 2**16
"""Bytes of one request, and of its headers; the application's limit of a body is smaller."""
MOST_HEADERS = 256
"""Of one request: each costs far more memory than the bytes that it is sent in."""
SLICE = 128
"""Bytes that are parsed at once: no more requests wait for their turn on a connection than fit into so many."""
AHEAD = 32 * 2**20
"""Bytes that all connections together may have sent ahead of the requests that are being answered."""


class Ahead:
    """What all connections of a server sent ahead, in bytes, and whose is parsed next: one piece a turn of the event loop, so that others
    are answered in between.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._waiting: deque[Connection] = deque()

    def wait(self, connection: "Connection") -> None:
        """Parses some of what the connection sent ahead when it is its turn."""
        self._waiting.append(connection)
        if len(self._waiting) == 1:
            connection.loop.call_soon(self._next)

    def _next(self) -> None:
        try:
            self._waiting[0].parse()
        finally:
            self._waiting.popleft()
            if self._waiting:
                self._waiting[0].loop.call_soon(self._next)


class Connection(HttpToolsProtocol):
    """Closes a connection that begins a request and does not go on, says too much, or does not read its answer: else some hundred of them
    would hold the server.

    What comes behind a whole request (pipelining) stays unparsed until that one is answered, and nothing more is read meanwhile.
    `all_ahead` is shared by the connections of a server; `of_server` is what uvicorn makes each of them with.
    """

    _patience: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None
    _taken = _headers = 0
    _largest = LARGEST_HEADERS
    _ahead: bytes | memoryview = b""
    _active: Any = None

    def __init__(self, all_ahead: Ahead, **of_server: Any) -> None:
        super().__init__(**of_server)
        self._all_ahead = all_ahead

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.flow = self._flow = _Flow(transport, self._turn)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._keep(b"")
        self._go_on()
        if self._reading is not None:
            self._reading.cancel()
        for cycle in (self._active, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None:  # uvicorn tells only the last one
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._keep(memoryview(bytes(self._ahead) + data) if self._ahead else memoryview(data))
        self.parse()
        if self._ahead and self._all_ahead.bytes > AHEAD:
            self._abort()

    def on_message_begin(self) -> None:
        self._taken = self._headers = 0
        self._largest = LARGEST_HEADERS
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers += 1
        if self._headers > MOST_HEADERS:
            raise ValueError("too many headers")  # to the parser: the request is answered with 400
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        waiting, self._largest = len(self.pipeline), LARGEST
        super().on_headers_complete()
        if len(self.pipeline) == waiting:
            self._active = self.cycle

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._active = self.pipeline[-1][0]
        super().on_response_complete()
        if self._reading is None:
            self._watch_reading()
        self._turn()

    def parse(self) -> None:
        """Parses what is ahead up to the end of a request, and some slice more; less where a body is not read as fast."""
        while self._ahead and not (self.transport.is_closing() or self._flow.paused or (self._asks() and not self.cycle.more_body)):
            part = self._ahead[:SLICE]
            self._keep(self._ahead[SLICE:])
            self._taken += len(part)
            if self._taken > self._largest:
                self._abort()
                return
            self._feed(part)
        if self.transport.is_closing():
            self._keep(b"")
        elif self._asks():
            self._go_on()
        elif self._patience is None:
            self._wait()

    def _feed(self, part: bytes | memoryview) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(part)
        except httptools.HttpParserUpgrade as upgrade:  # to a protocol that is not spoken here: it goes on in HTTP
            self._keep(memoryview(bytes(part[upgrade.args[0] :]) + bytes(self._ahead)))
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")

    def _turn(self) -> None:
        if self._ahead:
            self._all_ahead.wait(self)

    def _keep(self, data: bytes | memoryview) -> None:
        """What is not parsed yet; while there is any, no more is read."""
        self._all_ahead.bytes += len(data) - len(self._ahead)
        self._ahead = data
        self._flow.hold(len(data) > 0)

    def _abort(self) -> None:
        self._keep(b"")
        self.transport.abort()

    def _asks(self) -> bool:
        """A request's headers are complete, and it is not answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._patience = self.loop.call_later(HEADERS, self._close)

    def _go_on(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _close(self) -> None:
        self._patience = None
        if not self._asks():
            self.transport.close()

    def _watch_reading(self, before: int = 0) -> None:
        """Ends a connection whose answers stay where they are from one look to the next."""
        left, self._reading = self.transport.get_write_buffer_size(), None
        if left and left == before:
            self.transport.abort()
        elif left:
            self._reading = self.loop.call_later(HEADERS, self._watch_reading, left)


def connections() -> Any:
    """What uvicorn makes the connections of one server with."""
    return partial(Connection, Ahead())


class _Flow(FlowControl):
    """Does not read while uvicorn wants none, nor while the connection has something ahead; `resumed` is called when uvicorn wants more."""

    def __init__(self, transport: Any, resumed: Callable[[], None]) -> None:
        super().__init__(transport)
        self._resumed = resumed
        self._held = self.paused = False

    def pause_reading(self) -> None:
        self.paused = True
        self._apply()

    def resume_reading(self) -> None:
        if self.paused:
            self.paused = False
            self._apply()
            self._resumed()

    def hold(self, held: bool) -> None:
        self._held = held
        self._apply()

    def _apply(self) -> None:
        if self._held or self.paused:
            super().pause_reading()
        else:
            super().resume_reading()
