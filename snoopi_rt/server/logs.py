"""The log: JSON lines, or plain lines at a terminal. Logging never blocks, however slowly the log is read."""

import json
import logging
import os
import threading
import time
from collections import deque
from typing import Any

from snoopi_rt.shell import json_line, quote, visible

log = logging.getLogger("snoopi_rt.server")
MAX_BUFFERED_LINES = 1000
"""Lines that are buffered for a slow reader; more are dropped, and counted."""
FLUSH_SECONDS = 1.0
"""How long the end of the process waits for the reader."""


def log_event(event: str, message: str | None = None, **fields: Any) -> None:
    """Logs one event with its fields; a terminal shows `message` instead, by default the event and its fields."""
    document = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **fields}
    log.info(json_line(document), extra={"plain": message or event + plain_fields(fields)})


def plain_fields(fields: dict[str, Any]) -> str:
    """The fields as plain text; strings are quoted as a shell reads them back."""
    return "".join(f", {name} {quote(value) if isinstance(value, str) else value}" for name, value in fields.items())


def write_logs(as_json: bool, handler: logging.Handler) -> None:
    """Sends the log, and the warnings of all packages, to the handler from now on."""
    handler.setFormatter(JsonLines() if as_json else PlainLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    log.setLevel(logging.INFO)


class JsonLines(logging.Formatter):
    """Events are logged as JSON already; the messages of other packages become JSON too."""

    def format(self, record: logging.LogRecord) -> str:
        if hasattr(record, "plain"):
            return record.getMessage()
        document = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "event": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json_line(document)


class PlainLines(logging.Formatter):
    """A time and a message, with control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        text = getattr(record, "plain", None) or f"{record.levelname.lower()}: {record.getMessage()}"
        trace = self.formatException(record.exc_info).splitlines() if record.exc_info else []
        return time.strftime("%H:%M:%S ", time.localtime(record.created)) + "\n".join(map(visible, [text, *trace]))


class LineHandler(logging.Handler):
    """Writes lines to a file descriptor from a thread of its own: a pipe that nobody reads loses lines but never blocks a request."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor, self._dropped, self._broken = descriptor, 0, False
        self._lines: deque[str] = deque()
        self._changed = threading.Condition()
        threading.Thread(target=self._work, daemon=True, name="writes the log").start()

    def emit(self, record: logging.LogRecord) -> None:
        self.add(self.format(record))

    def add(self, line: str) -> None:
        """Writes a line as it is, soon."""
        with self._changed:
            if len(self._lines) < MAX_BUFFERED_LINES:
                self._lines.append(line)
            else:
                self._dropped += 1
            self._changed.notify_all()

    def flush(self) -> None:
        """Waits until all lines are written, for at most a second."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines or self._broken, FLUSH_SECONDS)

    def _work(self) -> None:
        while not self._broken:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                line, dropped = self._lines[0], self._dropped
            try:
                self._write(line)
                if dropped:
                    self._write(json.dumps({"event": "log lines dropped", "dropped": dropped}))
            except OSError:  # the reader has closed it
                self._broken = True
            with self._changed:
                self._lines.popleft()
                self._dropped -= dropped
                self._changed.notify_all()

    def _write(self, line: str) -> None:
        left = f"{line}\n".encode(errors="backslashreplace")
        while left:  # not by way of sys.stderr, whose lock a blocked write would hold when the process ends
            left = left[os.write(self._descriptor, left) :]
