"""torch.cuda as the scripts of a GPU use it, on a machine without one: a stream works at once, and a graph refuses what it would refuse."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
"""Operators whose results Python waits for."""


class FakeTorchGpu:
    """What was done with it: the names of its graphs' replays, and whether one is being captured."""

    def __init__(self) -> None:
        self.replays = 0
        self.compiled: list[dict[str, Any]] = []
        self.capturing = False

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Puts it in the place of torch.cuda's own, and of torch.compile, which on a CPU takes minutes."""
        fakes = {
            # To the scripts alone: torch itself asks too, and would believe it.
            "is_available": lambda: sys._getframe(1).f_globals["__name__"] == "gpu_timing",
            "get_device_name": lambda: "a rehearsal",
            "Event": Event,
            "Stream": Stream,
            "current_stream": Stream,
            "stream": lambda stream: nullcontext(),
            "CUDAGraph": lambda: Graph(self),
            "graph": self.capture,
            "synchronize": self.synchronize,
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda: None,
            "max_memory_allocated": lambda: 10**9,
        }
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(torch, "compile", self.compile)

    @contextmanager
    def capture(self, graph: "Graph") -> Iterator[None]:
        self.capturing = True
        with Recording():
            yield
        self.capturing, graph.whole = False, True

    def synchronize(self) -> None:
        assert not self.capturing, "CUDA error: operation not permitted when stream is capturing"

    def compile(self, function: Any, **options: Any) -> Any:
        self.compiled.append(options)
        return function


class Recording(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READS:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {function}")
        return function(*args, **(kwargs or {}))


class Graph:
    """Its outputs are those of the capture, which on a real GPU come with the first replay."""

    whole = False

    def __init__(self, gpu: FakeTorchGpu) -> None:
        self.gpu = gpu

    def replay(self) -> None:
        assert self.whole
        self.gpu.replays += 1


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        assert isinstance(other, Stream)


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        assert self.at

    def elapsed_time(self, end: "Event") -> float:
        return (end.at - self.at) * 1e3
