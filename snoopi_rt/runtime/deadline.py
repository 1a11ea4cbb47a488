"""How long a call may take, and whether anybody still waits for it."""

import time
from collections.abc import Sequence
from numbers import Real
from typing import Any, Protocol

from snoopi_rt.errors import Cancelled, InputError
from snoopi_rt.request import shown

LONGEST = 10**9
"""Seconds, some 32 years: what is longer is no number of them, or does not fit a clock."""


class Event(Protocol):
    """A threading.Event, or whatever else can say whether it is set."""

    def is_set(self) -> bool: ...


class AllSet:
    """An Event that is set once all of some events are: nobody waits for a call that they share."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._events = events

    def is_set(self) -> bool:
        return all(event.is_set() for event in self._events)


class Deadline:
    """Asked before every stage: a stage that has begun is finished.

    timeout: seconds from now on, None is no limit. cancel: an event that anybody may set. Raises InputError for a timeout that is none.
    """

    def __init__(self, timeout: Any = None, cancel: Event | None = None) -> None:
        real = isinstance(timeout, Real) and not isinstance(timeout, bool)
        if timeout is not None and not (real and 0 < timeout <= LONGEST):
            raise InputError(f"timeout must be a positive number of seconds, at most {LONGEST}, got {shown(timeout)}")
        self._timeout, self._cancel = timeout, cancel
        self._end = None if timeout is None else time.monotonic() + timeout

    def check(self, stage: str) -> None:
        """Returns when the stage may begin, else raises Cancelled."""
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled(f"cancelled before {stage}")
        if self._end is not None and time.monotonic() >= self._end:
            raise Cancelled(f"the timeout of {self._timeout:g} s is over before {stage}")
