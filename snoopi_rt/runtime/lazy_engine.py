"""An engine that is opened when it is first needed, and whose memory can be released in between."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from snoopi_rt.engines.base import Engine
from snoopi_rt.errors import EngineError


class LazyEngine:
    """Opens its engine once, however many threads call it; after `release` it is opened again, after `stop` never."""

    def __init__(self, open_engine: Callable[[], Engine]) -> None:
        self._open_engine = open_engine
        self._engine: Engine | None = None
        self._closed = False
        self._running = 0
        self._changed = threading.Condition(threading.Lock())

    def __call__(self, **arrays: Any) -> dict[str, np.ndarray]:
        """The engine's outputs. Raises what `open` raises, and what the engine raises."""
        with self._changed:
            engine = self._opened()
            self._running += 1
        try:
            return engine(**arrays)
        finally:
            with self._changed:
                # Whoever closes meanwhile frees it: this thread must not free it while the process exits.
                del engine
                self._running -= 1
                self._changed.notify_all()

    def open(self) -> Engine:
        """The engine. Raises what opening it raises, and EngineError after `stop`."""
        with self._changed:
            return self._opened()

    def release(self) -> None:
        """Frees the engine until it is needed again."""
        with self._changed:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def stop(self) -> None:
        """Refuses all further calls."""
        self._closed = True

    def close(self, seconds: float) -> None:
        """Stops, and frees the engine once its calls have finished; after `seconds` each call that still runs frees its part."""
        self.stop()
        end = time.monotonic() + seconds
        if not self._changed.acquire(timeout=seconds):  # it is being opened, and closed once that is done
            return
        try:
            while self._running and (rest := end - time.monotonic()) > 0:
                self._changed.wait(rest)
        finally:
            self._changed.release()
        self.release()

    def _opened(self) -> Engine:
        if self._engine is None and not self._closed:
            self._engine = self._open_engine()
        if self._closed:
            engine, self._engine = self._engine, None
            if engine is not None and not self._running:
                engine.close()
            raise EngineError("this pipeline is closed")
        assert self._engine is not None
        return self._engine
