"""One NVIDIA GPU through cuda-bindings: arrays, pinned host memory, one stream, and CUDA graphs. No torch."""

import ctypes
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from snoopi_rt.engines.base import engine_errors
from snoopi_rt.errors import EngineError, EngineMissing, how_to_install

POOL_BYTES = 256 * 2**20
"""Memory that the driver keeps for the next array, instead of releasing it at every synchronisation, which is its default."""


class Gpu:
    """The first GPU in CUDA_VISIBLE_DEVICES, and the one stream of all engines of the process: no event is needed between two graphs."""

    _one: "Gpu | None" = None
    _opening = threading.Lock()

    @classmethod
    def open(cls, name: str) -> Self:
        """The process's GPU; `name`: the engine's, for errors. Raises EngineMissing (no cuda-bindings), EngineError (no driver or GPU)."""
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
            self.call(runtime.cudaMemPoolSetAttribute, pool, threshold, driver.cuuint64_t(POOL_BYTES))
            (self.stream,) = self.call(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking)
        self.name = properties.name.decode().rstrip("\0")
        self.capability = (properties.major, properties.minor)
        self.driver = int(version)
        self._pinned: dict[int, list[int]] = defaultdict(list)
        # Reentrant: the garbage collector releases memory at any moment.
        self._guard = threading.RLock()

    def call(self, function: Any, *arguments: Any) -> tuple:
        """The results of a function of the CUDA runtime. Raises RuntimeError with CUDA's message."""
        error, *values = function(*arguments)
        if int(error):
            _, text = self.cuda.cudaGetErrorString(error)
            raise RuntimeError(f"CUDA says: {text.decode()}")
        return tuple(values)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        free, total = self.call(self.cuda.cudaMemGetInfo)
        return int(free), int(total)

    def wait(self) -> None:
        """Returns when all work on the stream is done."""
        self.call(self.cuda.cudaStreamSynchronize, self.stream)

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> "GpuArray":
        """An uninitialised array on the GPU."""
        return GpuArray(self, shape, dtype)

    def pinned(self, size: int) -> "Pinned":
        """Pinned host memory of at least `size` bytes, released when nothing holds it."""
        capacity = 1 << max(12, (size - 1).bit_length())
        with self._guard:
            free = self._pinned[capacity]
            if free:
                return Pinned(self, free.pop(), capacity)
        (pointer,) = self.call(self.cuda.cudaHostAlloc, capacity, self.cuda.cudaHostAllocDefault)
        return Pinned(self, int(pointer), capacity)

    def recycle(self, pointer: int, capacity: int) -> None:
        """Takes pinned memory back for reuse: allocating it takes longer than a copy."""
        with self._guard:
            self._pinned[capacity].append(pointer)

    def copy(self, to: int, source: int, size: int) -> None:
        """Copies `size` bytes between any two addresses, in stream order."""
        self.call(self.cuda.cudaMemcpyAsync, to, source, size, self.cuda.cudaMemcpyKind.cudaMemcpyDefault, self.stream)

    def capture(self, work: Callable[[Any], None]) -> Any:
        """The CUDA graph of what work(stream) enqueues; it is not run yet.

        It has a stream of its own, so that nothing that other threads enqueue meanwhile is captured. Raises what `work` raises, and
        RuntimeError if something cannot be captured.
        """
        cuda = self.cuda
        (capturing,) = self.call(cuda.cudaStreamCreateWithFlags, cuda.cudaStreamNonBlocking)
        try:
            self.call(cuda.cudaStreamBeginCapture, capturing, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
            try:
                work(capturing)
            except BaseException:
                cuda.cudaStreamEndCapture(capturing)  # fails too, with a less telling error
                raise
            (graph,) = self.call(cuda.cudaStreamEndCapture, capturing)
            try:
                (executable,) = self.call(cuda.cudaGraphInstantiate, graph, 0)
            finally:
                self.call(cuda.cudaGraphDestroy, graph)
        finally:
            self.call(cuda.cudaStreamDestroy, capturing)
        return executable

    def launch(self, graph: Any) -> None:
        """Runs a graph of `capture`."""
        self.call(self.cuda.cudaGraphLaunch, graph, self.stream)

    def destroy(self, graph: Any) -> None:
        """Frees a graph of `capture`."""
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
    """A block of pinned memory, which arrays on it keep alive."""

    def __init__(self, gpu: Gpu, pointer: int, capacity: int) -> None:
        self.gpu, self.pointer, self.capacity = gpu, pointer, capacity

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A view of its first bytes."""
        size = int(np.prod(shape)) * dtype.itemsize
        view: Any = (ctypes.c_char * size).from_address(self.pointer)
        view.memory = self  # the array's base keeps it alive
        return np.frombuffer(view, dtype).reshape(shape)

    def __del__(self) -> None:
        self.gpu.recycle(self.pointer, self.capacity)
