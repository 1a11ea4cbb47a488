"""A graph as an engine that is opened when it is first needed, and whose memory can be given back in between."""

import threading
from collections.abc import Callable

from snoopi_rt.engines.base import Engine, EngineError


class Stage:
    """Opens its engine once, however many threads ask; after `release` it opens it again, after `close` never."""

    def __init__(self, open_engine: Callable[[], Engine]) -> None:
        self._open_engine = open_engine
        self._engine: Engine | None = None
        self._closed = False
        self._changing = threading.Lock()

    def open(self) -> Engine:
        """The engine. Raises what opening it raises, and EngineError after `close`."""
        with self._changing:
            if self._closed:
                raise EngineError("this pipeline is closed")
            if self._engine is None:
                self._engine = self._open_engine()
            return self._engine

    def release(self) -> None:
        """Frees the engine until it is needed again."""
        with self._changing:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def close(self) -> None:
        """Frees the engine for good."""
        with self._changing:
            self._closed = True
        self.release()
