"""Ctrl-C and SIGTERM on the command line: the first stops after what runs in native code and cleans up, the second ends at once."""

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from snoopi_rt.engines.native import postpone

PATIENCE = 1.0
"""Seconds after which it is said that something still runs."""
ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A signal to end, raised in the main thread wherever it is. Everything that is cleaned up after Ctrl-C is after SIGTERM too."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number
        """The exit code, as shells have it."""


@contextmanager
def interruptible() -> Iterator[list[Interrupted]]:
    """A block in the main thread that signals end; what it gives lists those that came, since others may make something else of them.

    Signals that the process was told to ignore, as under nohup, stay ignored.
    """
    came: list[Interrupted] = []
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield came
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(Interrupted(number))
        if noting := _noting[-1:]:
            noting[0].append(came[-1])
        elif not postpone(came[-1]):
            raise came[-1]

    before = {number: signal.getsignal(number) for number in ENDING}
    ours = [number for number, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    # Python's own handlers run when native code has returned; what is written here is read meanwhile.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield came
    finally:
        # After a signal the process ends, which takes its time too.
        for number in ours:
            signal.signal(number, _leave_it_to_the_watch if came else before[number])
        if not came:
            signal.set_wakeup_fd(woken)
            os.close(writer)


_noting: list[list[Interrupted]] = []


@contextmanager
def deferred() -> Iterator[list[Interrupted]]:
    """A block of `interruptible` in which signals are listed and not raised: it looks itself between its steps."""
    noted: list[Interrupted] = []
    _noting.append(noted)
    try:
        yield noted
    finally:
        _noting.remove(noted)


def _leave_it_to_the_watch(number: int, frame: FrameType | None) -> None:
    """The handler of a second signal: unlike this one, the watching thread need not wait for native code."""


@contextmanager
def handlers_kept() -> Iterator[None]:
    """A block of a package that sets its own handlers, in Python or below it, and is not to: those from before stand afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # set by what embeds Python
                signal.signal(number, handler)


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
                print("stopping: the call that runs ends first; once more ends it now", file=sys.stderr, flush=True)
    finally:
        os.close(reader)
