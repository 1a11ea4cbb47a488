"""The log: lines of JSON, or lines for people at a terminal. It never waits for whoever reads them."""

import json
import logging
import os
import threading
import time
from collections import deque
from typing import Any

from snoopi_rt.shell import json_line, quote, visible

log = logging.getLogger("snoopi_rt.server")
WAITING_LINES = 1000
"""Lines that wait for a reader who is slow; more are dropped, and counted."""
LAST_SECONDS = 1.0
"""How long the end of the process waits for a reader."""


def tell(what: str, people: str | None = None, **facts: Any) -> None:
    """One line in the log: `what` happened and its facts; at a terminal `people` stands in their place."""
    document = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "what": what, **facts}
    log.info(json_line(document), extra={"people": people or what + in_words(facts)})


def in_words(facts: dict[str, Any]) -> str:
    """The facts for people, text as a shell reads it back."""
    return "".join(f", {name} {quote(fact) if isinstance(fact, str) else fact}" for name, fact in facts.items())


def write_logs(as_json: bool) -> "LineHandler":
    """Sends the log, and the warnings of all packages, to standard error from now on."""
    handler = LineHandler(2)
    handler.setFormatter(JsonLines() if as_json else PeopleLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    log.setLevel(logging.INFO)
    return handler


class JsonLines(logging.Formatter):
    """What `tell` was told is JSON already; other packages' messages become JSON too."""

    def format(self, record: logging.LogRecord) -> str:
        if hasattr(record, "people"):
            return record.getMessage()
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        document = {"time": moment, "what": record.levelname.lower(), "from": record.name, "message": record.getMessage()}
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json_line(document)


class PeopleLines(logging.Formatter):
    """A time and a sentence; what is foreign in it is written as a shell reads it back."""

    def format(self, record: logging.LogRecord) -> str:
        text = getattr(record, "people", None) or f"{record.levelname.lower()}: {record.getMessage()}"
        trace = self.formatException(record.exc_info).splitlines() if record.exc_info else []
        return time.strftime("%H:%M:%S ", time.localtime(record.created)) + "\n".join(map(visible, [text, *trace]))


class LineHandler(logging.Handler):
    """Writes lines to a file descriptor from a thread of its own: a pipe that nobody reads costs lines, never an answer."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor, self._dropped, self._broken = descriptor, 0, False
        self._lines: deque[str] = deque()
        self._changed = threading.Condition()
        threading.Thread(target=self._work, daemon=True, name="writes the log").start()

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        with self._changed:
            if len(self._lines) < WAITING_LINES:
                self._lines.append(line)
            else:
                self._dropped += 1
            self._changed.notify_all()

    def flush(self) -> None:
        """Returns when all lines are written, or after a second."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines or self._broken, LAST_SECONDS)

    def _work(self) -> None:
        while not self._broken:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                line, dropped = self._lines[0], self._dropped
            try:
                self._write(line)
                if dropped:
                    self._write(json.dumps({"what": "the log was not read", "dropped": dropped}))
            except OSError:  # whoever read it is gone
                self._broken = True
            with self._changed:
                self._lines.popleft()
                self._dropped -= dropped
                self._changed.notify_all()

    def _write(self, line: str) -> None:
        left = f"{line}\n".encode(errors="backslashreplace")
        while left:  # not by way of sys.stderr, whose lock a blocked write would hold when the process ends
            left = left[os.write(self._descriptor, left) :]
