"""Draws waiting requests together: those that arrive while a pipeline draws share its next call."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from snoopi_rt.errors import Cancelled, SnoopiError
from snoopi_rt.pipeline import Pipeline
from snoopi_rt.request import Request
from snoopi_rt.result import Result

Observe = Callable[[int, Mapping[str, float]], None]
"""observe(images, seconds by stage), for every call of a pipeline."""


class QueueFull(SnoopiError):
    """Too many images are waiting for another request to be accepted."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the queue is full, try again in {seconds:.0f} s")
        self.seconds = seconds

    def __reduce__(self) -> tuple[type["QueueFull"], tuple[float]]:
        """For pickling, which would call the class with its message."""
        return QueueFull, (self.seconds,)


@dataclass(eq=False)
class Waiting:
    """One request's images, all of one size, and the future that gets their Result. It is late after `end`, by time.monotonic()."""

    images: list[Request]
    size: tuple[int, int]
    truncate: bool
    end: float
    future: "asyncio.Future[Result]"

    def is_set(self) -> bool:
        """Whether nobody waits for it any longer: it is the event that cancels its own call."""
        return self.future.cancelled() or time.monotonic() > self.end


class ServedModel(Protocol):
    """A model and what draws its images: `name` is what clients call it, `pipe` knows what it can draw, `waiting` counts waiting images.

    `pace`: recent seconds per image; None if not known.
    """

    name: str
    pipe: Pipeline

    @property
    def waiting(self) -> int: ...

    @property
    def pace(self) -> float | None: ...

    async def draw(self, images: list[Request], size: tuple[int, int], timeout: float, truncate: bool) -> Result:
        """The images; with `truncate`, prompts that are too long are cut. A cancelled task is not drawn, unless that has begun.

        Raises QueueFull, Cancelled after `timeout` seconds in the queue, and what Pipeline.generate raises.
        """
        ...

    def close(self) -> None:
        """Draws what is waiting and frees the pipeline."""
        ...


class Batcher:
    """A thread that draws for one pipeline, and the queue before it: a ServedModel of this process. Made inside an event loop.

    wait: seconds that a batch which is not full waits for more; at 0 a batch has only what came while the last one was drawn.
    max_batch: most images per call, if the bundle takes as many; 1 turns batching off. limit: most images that may wait.
    observe: called after every call. pace: seconds per image before any were drawn.
    """

    def __init__(self, name: str, pipe: Pipeline, wait: float, max_batch: int, limit: int, observe: Observe, pace: float = 0.1) -> None:
        self.name, self.pipe = name, pipe
        self._wait, self._max_batch, self._limit, self._observe = wait, min(max_batch, pipe.max_batch), limit, observe
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.pace = pace
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"draws {name}")
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return _images(tuple(self._queue))

    async def draw(self, images: list[Request], size: tuple[int, int], timeout: float, truncate: bool) -> Result:
        """See ServedModel."""
        item = Waiting(images, size, truncate, time.monotonic() + timeout, self._loop.create_future())
        with self._changed:
            if self._closed:
                raise Cancelled("the server is stopping")
            self._let_go()
            waiting = self.waiting
            if waiting and waiting + len(images) > self._limit:
                raise QueueFull(max(1.0, waiting * self.pace))
            self._queue.append(item)
            self._changed.notify()
        return await item.future

    def close(self) -> None:
        """See ServedModel."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self.pipe.close()

    def _work(self) -> None:
        while batch := self._next():
            self._draw(batch)

    def _next(self) -> list[Waiting]:
        """The next requests of one size, as many as fit together; empty once closed and done."""
        with self._changed:
            while True:
                batch = self._take([])
                end = time.monotonic() + self._wait
                while batch and not self._closed and self._max_batch > 1 and (rest := end - time.monotonic()) > 0:
                    if _images(batch) >= self._max_batch:
                        break
                    self._changed.wait(rest)
                    batch = self._take(batch)
                batch = [item for item in batch if not self._is_late(item)]
                if batch:
                    return batch
                if not self._queue:
                    if self._closed:
                        return []
                    self._changed.wait()

    def _take(self, batch: list[Waiting]) -> list[Waiting]:
        """The batch with what fits into it from the queue, in order."""
        self._let_go()
        left: deque[Waiting] = deque()
        count = _images(batch)
        for item in self._queue:
            alike = not batch or (item.size, item.truncate) == (batch[0].size, batch[0].truncate)
            if not batch or (alike and count + len(item.images) <= self._max_batch):
                batch = [*batch, item]
                count += len(item.images)
            else:
                left.append(item)
        self._queue = left
        return batch

    def _let_go(self) -> None:
        """Drops late and cancelled requests from the queue, so that they take no place in it."""
        self._queue = deque(item for item in self._queue if not self._is_late(item))

    def _is_late(self, item: Waiting) -> bool:
        late = item.is_set()
        if late:
            self._answer(item, Cancelled("timed out while waiting in the queue"))
        return late

    def _draw(self, batch: list[Waiting]) -> None:
        start, first = time.monotonic(), batch[0]
        results = list(self.pipe.run_each([item.images for item in batch], first.size, first.truncate, cancel=batch))
        drawn = [result for result in results if isinstance(result, Result)]
        for timings, together in groupby(drawn, lambda result: result.timings):  # several calls, if one of the requests was wrong
            self._observe(sum(map(len, together)), timings)
        if images := sum(map(len, drawn)):
            self.pace += 0.2 * ((time.monotonic() - start) / images - self.pace)
        for item, result in zip(batch, results, strict=True):
            self._answer(item, result)

    def _answer(self, item: Waiting, answer: Result | BaseException) -> None:
        def give() -> None:
            if item.future.done():  # cancelled
                return
            if isinstance(answer, BaseException):
                item.future.set_exception(answer)
            else:
                item.future.set_result(answer)

        with suppress(RuntimeError):  # the loop has ended, and with it everyone who waited
            self._loop.call_soon_threadsafe(give)


def _images(waiting: Iterable[Waiting]) -> int:
    """The number of all their images."""
    return sum(len(item.images) for item in waiting)
