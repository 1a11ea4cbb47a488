"""Ctrl-C and SIGTERM on the command line: the first stops after what runs in native code and cleans up, the second ends at once."""

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

PATIENCE = 1.0
"""Seconds after which it is said that something still runs."""
ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A signal to end, raised in the main thread wherever it is. Everything that is cleaned up after Ctrl-C is after SIGTERM too."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number
        """The exit code, as shells have it."""


def raise_interrupted(number: int, frame: FrameType | None) -> None:
    """The handler of the first signal."""
    raise Interrupted(number)


@contextmanager
def interruptible() -> Iterator[None]:
    """A block in the main thread that signals end. Signals that the process was told to ignore, as under nohup, stay ignored."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(os, "set_blocking") or sys.platform == "win32":
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    ours = [number for number, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    # Python's own handlers run when native code has returned; what is written here is read meanwhile.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    for number in ours:
        signal.signal(number, raise_interrupted)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
        signal.set_wakeup_fd(woken)
        os.close(writer)


def end_now(number: int) -> None:
    """Ends the process here, without waiting for anything."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(128 + number)


def _watch(reader: int) -> None:
    first = 0
    try:
        while signals := os.read(reader, 1):
            if signals[0] not in ENDING:
                continue
            if first:
                end_now(signals[0])
            first = signals[0]
            if not select.select([reader], [], [], PATIENCE)[0]:
                print("stopping: what is begun is finished first; once more ends it now", file=sys.stderr, flush=True)
    finally:
        os.close(reader)
