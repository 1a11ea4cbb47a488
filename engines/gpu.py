"""One NVIDIA GPU through cuda-bindings: arrays on it, pinned memory of the host, one stream and graphs of it. No torch."""

import ctypes
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from snoopi_rt.engines.base import engine_errors
from snoopi_rt.errors import EngineError, EngineMissing, how_to_install

POOL = 256 * 2**20
"""Bytes that the driver keeps for the next array instead of giving them back at every wait, which is its default."""


class Gpu:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves, and the stream on which all engines of the process work.

    One stream for all: what one graph writes, the next reads without an event between them.
    """

    _one: "Gpu | None" = None
    _opening = threading.Lock()

    @classmethod
    def open(cls, name: str) -> Self:
        """The process's GPU, for the engine of that name. Raises EngineMissing (no cuda-bindings), EngineError (no driver or no GPU)."""
        with cls._opening:
            if cls._one is None:
                cls._one = cls(name)
            return cls._one  # type: ignore[return-value]

    def __init__(self, name: str) -> None:
        try:
            from cuda.bindings import driver, runtime
        except ImportError as error:
            raise EngineMissing(f"engine {name!r} needs cuda-bindings: {how_to_install(name)}") from error
        self.cuda: Any = runtime
        try:
            (count,) = self.call(runtime.cudaGetDeviceCount)
        except RuntimeError as error:
            raise EngineError(f"engine {name!r} needs an NVIDIA GPU and its driver for CUDA 13: {error}") from error
        if not count:
            raise EngineError(f"engine {name!r} needs an NVIDIA GPU, and none is visible (CUDA_VISIBLE_DEVICES)")
        with engine_errors(f"engine {name!r} cannot use the GPU"):
            (properties,) = self.call(runtime.cudaGetDeviceProperties, 0)
            (version,) = self.call(runtime.cudaDriverGetVersion)
            (pool,) = self.call(runtime.cudaDeviceGetDefaultMemPool, 0)
            threshold = runtime.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
            self.call(runtime.cudaMemPoolSetAttribute, pool, threshold, driver.cuuint64_t(POOL))
            (self.stream,) = self.call(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking)
        self.name = properties.name.decode().rstrip("\0")
        self.capability = (properties.major, properties.minor)
        self.driver = int(version)
        self._pinned: dict[int, list[int]] = defaultdict(list)
        # One thread may take it twice: the garbage collector gives memory back at any moment.
        self._guard = threading.RLock()

    def call(self, function: Any, *arguments: Any) -> tuple:
        """What a function of the CUDA runtime gives. Raises RuntimeError with CUDA's own words."""
        error, *values = function(*arguments)
        if int(error):
            _, text = self.cuda.cudaGetErrorString(error)
            raise RuntimeError(f"CUDA says: {text.decode()}")
        return tuple(values)

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and all."""
        free, total = self.call(self.cuda.cudaMemGetInfo)
        return int(free), int(total)

    def wait(self) -> None:
        """Returns when all work on the stream is done."""
        self.call(self.cuda.cudaStreamSynchronize, self.stream)

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> "GpuArray":
        """A new array on the GPU, of no values yet."""
        return GpuArray(self, shape, dtype)

    def pinned(self, size: int) -> "Pinned":
        """Memory of the host that the GPU copies from and to at full speed; given back when nothing holds it."""
        room = 1 << max(12, (size - 1).bit_length())
        with self._guard:
            kept = self._pinned[room]
            if kept:
                return Pinned(self, kept.pop(), room)
        (pointer,) = self.call(self.cuda.cudaHostAlloc, room, self.cuda.cudaHostAllocDefault)
        return Pinned(self, int(pointer), room)

    def keep(self, pointer: int, room: int) -> None:
        """Takes pinned memory back, for the next who asks: making it anew takes longer than a copy."""
        with self._guard:
            self._pinned[room].append(pointer)

    def copy(self, to: int, source: int, size: int) -> None:
        """Bytes from anywhere to anywhere, in the stream's order."""
        self.call(self.cuda.cudaMemcpyAsync, to, source, size, self.cuda.cudaMemcpyKind.cudaMemcpyDefault, self.stream)

    def recorded(self, work: Callable[[Any], None]) -> Any:
        """What work(stream) puts on a stream, as a graph that can be launched again; nothing of it is done yet.

        The stream is one of its own: what other threads do meanwhile on the one of all engines is none of it. Raises what work raises,
        and RuntimeError where something in it cannot be recorded.
        """
        cuda = self.cuda
        (apart,) = self.call(cuda.cudaStreamCreateWithFlags, cuda.cudaStreamNonBlocking)
        try:
            self.call(cuda.cudaStreamBeginCapture, apart, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
            try:
                work(apart)
            except BaseException:
                cuda.cudaStreamEndCapture(apart)  # it fails too, and says less
                raise
            (graph,) = self.call(cuda.cudaStreamEndCapture, apart)
            try:
                (executable,) = self.call(cuda.cudaGraphInstantiate, graph, 0)
            finally:
                self.call(cuda.cudaGraphDestroy, graph)
        finally:
            self.call(cuda.cudaStreamDestroy, apart)
        return executable

    def launch(self, graph: Any) -> None:
        """Does what `recorded` recorded."""
        self.call(self.cuda.cudaGraphLaunch, graph, self.stream)

    def forget(self, graph: Any) -> None:
        """Frees a graph."""
        self.call(self.cuda.cudaGraphExecDestroy, graph)


class GpuArray:
    """An array on the GPU, freed when nothing holds it. `np.asarray` waits for the stream and copies it."""

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.gpu, self.shape, self.dtype = gpu, shape, np.dtype(dtype)
        self.nbytes = int(np.prod(shape)) * self.dtype.itemsize
        (pointer,) = gpu.call(gpu.cuda.cudaMallocAsync, max(self.nbytes, 1), gpu.stream)
        self.pointer = int(pointer)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with engine_errors("the GPU failed"):
            memory = self.gpu.pinned(self.nbytes)
            self.gpu.copy(memory.pointer, self.pointer, self.nbytes)
            self.gpu.wait()
        values = memory.array(self.shape, self.dtype)
        return values if dtype is None else values.astype(dtype)

    def __del__(self) -> None:
        if hasattr(self, "pointer"):
            self.gpu.cuda.cudaFreeAsync(self.pointer, self.gpu.stream)


class Pinned:
    """A piece of pinned memory; arrays that show it hold it."""

    def __init__(self, gpu: Gpu, pointer: int, room: int) -> None:
        self.gpu, self.pointer, self.room = gpu, pointer, room

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A view of its first bytes."""
        size = int(np.prod(shape)) * dtype.itemsize
        view: Any = (ctypes.c_char * size).from_address(self.pointer)
        view.memory = self  # so that the array's base holds the memory
        return np.frombuffer(view, dtype).reshape(shape)

    def __del__(self) -> None:
        self.gpu.keep(self.pointer, self.room)
