"""Ctrl-C and SIGTERM on the command line: the first waits for native code and cleans up, the second exits at once."""

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from snoopi_rt.engines.native import postpone

NOTICE_SECONDS = 1.0
"""Seconds after which a message says that native code is still running."""
TERMINATING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A terminating signal, raised in the main thread. Whatever is cleaned up after Ctrl-C is cleaned up after SIGTERM too."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number
        """The exit code, as shells have it."""


@contextmanager
def interruptible() -> Iterator[list[Interrupted]]:
    """A block in the main thread that signals terminate. Yields the signals received so far, since other code may catch the exception.

    Signals that are ignored, as under nohup, stay ignored.
    """
    received: list[Interrupted] = []
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield received
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(Interrupted(number))
        if deferring := _deferring[-1:]:
            deferring[0].append(received[-1])
        elif not postpone(received[-1]):
            raise received[-1]

    before = {number: signal.getsignal(number) for number in TERMINATING}
    ours = [number for number, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    # Python's own handlers run only when native code has returned; the pipe is read meanwhile.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield received
    finally:
        # After a signal the process exits, which may take long too.
        for number in ours:
            signal.signal(number, _handled_by_watcher if received else before[number])
        if not received:
            signal.set_wakeup_fd(previous_fd)
            os.close(writer)


_deferring: list[list[Interrupted]] = []


@contextmanager
def deferred() -> Iterator[list[Interrupted]]:
    """A block of `interruptible` in which signals are collected and not raised: it checks them itself between its steps."""
    signals: list[Interrupted] = []
    _deferring.append(signals)
    try:
        yield signals
    finally:
        _deferring.remove(signals)


def _handled_by_watcher(number: int, frame: FrameType | None) -> None:
    """The handler of a second signal: the watching thread acts on it, because it need not wait for native code."""


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Restores the signal handlers after a block in which a package sets its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in TERMINATING}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # set by a program that embeds Python
                signal.signal(number, handler)


def end_now(number: int) -> None:
    """Exits the process immediately."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(128 + number)


def _watch(reader: int) -> None:
    first = 0
    try:
        while signals := os.read(reader, 1):
            if signals[0] not in TERMINATING:
                continue
            if first:
                end_now(signals[0])
            first = signals[0]
            if not select.select([reader], [], [], NOTICE_SECONDS)[0]:
                print("stopping after the running call; press again to stop now", file=sys.stderr, flush=True)
    finally:
        os.close(reader)
