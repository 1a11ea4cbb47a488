"""Blocks in the native code of a package; the end of the process waits for those of other threads.

A daemon thread that returns from native code while the interpreter shuts down is unwound through that code, which aborts the process
("terminate called without an active exception").
"""

import atexit
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

WAIT = 60.0
"""Seconds that the end of the process waits at most."""


class _Native:
    """The threads in native code, and the thread that ends the process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: Counter[int] = Counter()
        self._ending: int | None = None
        self._registered = False
        self._postponed: dict[int, BaseException] = {}

    @contextmanager
    def block(self) -> Iterator[None]:
        """See `native_code`."""
        me = threading.get_ident()
        with self._changed:
            if self._ending not in (None, me):
                raise SystemExit  # ends a thread silently
            if not self._registered:  # here, since nothing happens at import
                self._registered = True
                atexit.register(self._end)
                if hasattr(os, "register_at_fork"):
                    os.register_at_fork(after_in_child=self.__init__)  # type: ignore[misc]  # a child has no other threads
            self._inside[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside[me] -= 1
                self._changed.notify_all()
            if not self._inside[me] and me in self._postponed:
                raise self._postponed.pop(me)

    def postpone(self, error: BaseException) -> bool:
        """See `postpone`."""
        me = threading.get_ident()
        if self._inside[me] > 0:
            self._postponed.setdefault(me, error)
        return self._inside[me] > 0

    def _end(self) -> None:
        me, end = threading.get_ident(), time.monotonic() + WAIT
        try:
            with self._changed:
                self._ending = me
                while any(count for thread, count in self._inside.items() if thread != me) and (rest := end - time.monotonic()) > 0:
                    self._changed.wait(rest)
        except KeyboardInterrupt:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(130)


_native = _Native()
native_code = _native.block
"""A block in native code. When the process ends, no new one starts in a daemon thread, and the process waits for those that run."""
postpone = _native.postpone
"""postpone(error), for a signal handler: raises the error when the thread leaves its block; returns False if it is in none.

Foreign packages swallow an exception that a handler raises inside them, or replace it.
"""
