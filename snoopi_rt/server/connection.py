"""HTTP connections with limits on stalled requests, unread answers and pipelined data, so that such clients cost little."""

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_SECONDS = 10.0
"""Seconds within which a connection must have sent a request's headers, and within which it must read some of an answer."""
MAX_REQUEST, MAX_HEADER_BYTES = 2**18, 2**16
"""Bytes of a request, and of its headers; the application's limit for a body is smaller."""
MAX_HEADERS = 256
"""Headers of a request: each uses far more memory than its bytes."""
SLICE = 128
"""Bytes that are parsed at once, which bounds the number of parsed requests that wait on a connection."""
MAX_AHEAD = 32 * 2**20
"""Bytes that all connections together may have pipelined behind the requests that are being answered."""


class Ahead:
    """The pipelined bytes of all connections, and whose are parsed next: one piece per turn of the event loop, so that others are
    answered in between.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._waiting: deque[Connection] = deque()

    def wait(self, connection: "Connection") -> None:
        """Parses some of the connection's pipelined data when it is its turn."""
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
    """Closes a connection that stalls in a request, sends too much, or does not read its answer: otherwise a few hundred of them would
    block the server.

    What follows a complete request (pipelining) stays unparsed until that is answered, and nothing more is read meanwhile.
    `all_ahead` is shared by the connections of a server; `uvicorn_options` are uvicorn's own.
    """

    _stall_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None
    _parsed = _headers = 0
    _largest = MAX_HEADER_BYTES
    _ahead: bytes | memoryview = b""
    _active: Any = None

    def __init__(self, all_ahead: Ahead, **uvicorn_options: Any) -> None:
        super().__init__(**uvicorn_options)
        self._all_ahead = all_ahead

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.flow = self._flow = _Flow(transport, self._turn)
        self._start_stall_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._keep(b"")
        self._cancel_stall_timer()
        if self._read_timer is not None:
            self._read_timer.cancel()
        for cycle in (self._active, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None:  # uvicorn notifies only the last one
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._keep(memoryview(bytes(self._ahead) + data) if self._ahead else memoryview(data))
        self.parse()
        if self._ahead and self._all_ahead.bytes > MAX_AHEAD:
            self._abort()

    def on_message_begin(self) -> None:
        self._parsed = self._headers = 0
        self._largest = MAX_HEADER_BYTES
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers += 1
        if self._headers > MAX_HEADERS:
            raise ValueError("too many headers")  # to the parser: the request is answered with 400
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        waiting, self._largest = len(self.pipeline), MAX_REQUEST
        super().on_headers_complete()
        if len(self.pipeline) == waiting:
            self._active = self.cycle

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._active = self.pipeline[-1][0]
        super().on_response_complete()
        if self._read_timer is None:
            self._watch_reading()
        self._turn()

    def parse(self) -> None:
        """Parses pipelined data up to the end of a request, plus at most a slice; less if a body is not read as fast."""
        while self._ahead and not (self.transport.is_closing() or self._flow.paused or (self._is_answering() and not self.cycle.more_body)):
            part = self._ahead[:SLICE]
            self._keep(self._ahead[SLICE:])
            self._parsed += len(part)
            if self._parsed > self._largest:
                self._abort()
                return
            self._feed(part)
        if self.transport.is_closing():
            self._keep(b"")
        elif self._is_answering():
            self._cancel_stall_timer()
        elif self._stall_timer is None:
            self._start_stall_timer()

    def _feed(self, part: bytes | memoryview) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(part)
        except httptools.HttpParserUpgrade as upgrade:  # to an unsupported protocol: it continues in HTTP
            self._keep(memoryview(bytes(part[upgrade.args[0] :]) + bytes(self._ahead)))
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")

    def _turn(self) -> None:
        if self._ahead:
            self._all_ahead.wait(self)

    def _keep(self, data: bytes | memoryview) -> None:
        """Sets the data that is not parsed yet; while there is any, no more is read."""
        self._all_ahead.bytes += len(data) - len(self._ahead)
        self._ahead = data
        self._flow.hold(len(data) > 0)

    def _abort(self) -> None:
        self._keep(b"")
        self.transport.abort()

    def _is_answering(self) -> bool:
        """Whether a request has been received and not been answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def _start_stall_timer(self) -> None:
        self._stall_timer = self.loop.call_later(HEADER_SECONDS, self._close)

    def _cancel_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _close(self) -> None:
        self._stall_timer = None
        if not self._is_answering():
            self.transport.close()

    def _watch_reading(self, before: int = 0) -> None:
        """Aborts a connection whose unread answers have not shrunk since the last check."""
        left, self._read_timer = self.transport.get_write_buffer_size(), None
        if left and left == before:
            self.transport.abort()
        elif left:
            self._read_timer = self.loop.call_later(HEADER_SECONDS, self._watch_reading, left)


def connections() -> Any:
    """The protocol factory for one uvicorn server."""
    return partial(Connection, Ahead())


class _Flow(FlowControl):
    """Pauses reading while uvicorn wants that, and while the connection has pipelined data; `resumed` is called when uvicorn resumes."""

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
