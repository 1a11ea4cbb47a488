"""How long a call may take, and whether it was cancelled."""

import time
from collections.abc import Sequence
from numbers import Real
from typing import Any, Protocol

from snoopi_rt.errors import Cancelled, InputError
from snoopi_rt.request import shown

MAX_SECONDS = 10**9
"""Some 32 years; more may not fit a clock."""


class Event(Protocol):
    """A threading.Event, or anything else with `is_set`."""

    def is_set(self) -> bool: ...


class AllSet:
    """An Event that is set once all of the given events are: then nobody waits any longer for a call that they share."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._events = events

    def is_set(self) -> bool:
        return all(event.is_set() for event in self._events)


class AnySet:
    """An Event that is set once any of the given events is."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._events = events

    def is_set(self) -> bool:
        return any(event.is_set() for event in self._events)


class Deadline:
    """Checked before every stage: a stage that has begun is finished.

    timeout: seconds from now, None for no limit. cancel: an event that cancels the call. Raises InputError for an invalid timeout.
    """

    def __init__(self, timeout: Any = None, cancel: Event | None = None) -> None:
        real = isinstance(timeout, Real) and not isinstance(timeout, bool)
        if timeout is not None and not (real and 0 < timeout <= MAX_SECONDS):
            raise InputError(f"timeout must be a positive number of seconds, at most {MAX_SECONDS}, got {shown(timeout)}")
        self._timeout, self._cancel = timeout, cancel
        self._end = None if timeout is None else time.monotonic() + timeout

    def check(self, stage: str) -> None:
        """Raises Cancelled if the stage may no longer begin."""
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled(f"cancelled before {stage}")
        if self._end is not None and time.monotonic() >= self._end:
            raise Cancelled(f"the timeout of {self._timeout:g} s expired before {stage}")
