"""A GPU and a TensorRT that are not there: device memory is host memory, a plan is a table of functions, and every call is written down.

The stream does its work at once. What they refuse is what the real ones refuse: memory that was freed, an allocation while a graph is
captured, a context without shapes or addresses.
"""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np


class FakeCuda:
    """The functions of cuda.bindings.runtime that the engine uses: each gives an error number and its values."""

    cudaStreamNonBlocking = cudaHostAllocDefault = cudaEventDisableTiming = 0
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaMemPoolAttr = SimpleNamespace(cudaMemPoolAttrReleaseThreshold=4)

    def __init__(self, devices: int = 1, capability: tuple[int, int] = (8, 9)) -> None:
        self.devices, self.capability = devices, capability
        self.memory: dict[int, Any] = {}
        self.pinned = 0
        self.free = self.total = 1 << 34
        self.kept = 0
        self.capturable = True
        self.did: list[str] = []
        self.capturing: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}

    def cudaGetDeviceCount(self) -> tuple:
        return 0, self.devices

    def cudaGetDeviceProperties(self, device: int) -> tuple:
        return 0, SimpleNamespace(name=b"Fake 4090", major=self.capability[0], minor=self.capability[1])

    def cudaDriverGetVersion(self) -> tuple:
        return 0, 13000

    def cudaMemGetInfo(self) -> tuple:
        return 0, self.free, self.total

    def cudaDeviceGetDefaultMemPool(self, device: int) -> tuple:
        return 0, 3

    def cudaMemPoolSetAttribute(self, pool: int, attribute: int, value: int) -> tuple:
        assert (pool, attribute) == (3, 4)
        self.kept = value
        return (0,)

    def cudaGetErrorString(self, error: int) -> tuple:
        return 0, f"error {error}".encode()

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple:
        return 0, len(self.did) + 1

    def cudaStreamDestroy(self, stream: int) -> tuple:
        return (0,)

    cudaStreamSynchronize = cudaEventSynchronize = cudaEventDestroy = cudaStreamDestroy

    def cudaEventCreateWithFlags(self, flags: int) -> tuple:
        return 0, 7

    def cudaEventRecord(self, event: int, stream: int) -> tuple:
        return (0,)

    def cudaMallocAsync(self, size: int, stream: int) -> tuple:
        if self.capturing is not None:
            return (901,)
        block = ctypes.create_string_buffer(b"\xff" * size, size)
        self.memory[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaFreeAsync(self, pointer: int, stream: int) -> tuple:
        block = self.memory.pop(pointer)
        ctypes.memset(pointer, 0xFF, len(block))  # NaN to who still reads it
        return (0,)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple:
        error, pointer = self.cudaMallocAsync(size, 0)
        self.pinned += 1
        return error, pointer

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple:
        ctypes.memmove(to, source, size)
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple:
        self.capturing = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple:
        captured, self.capturing = self.capturing, None
        assert captured is not None
        if not self.capturable:
            return 901, None
        self.graphs[len(self.graphs) + 1] = captured
        return 0, len(self.graphs)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple:
        return 0, graph

    def cudaGraphDestroy(self, graph: int) -> tuple:
        return (0,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple:
        del self.graphs[graph]
        return (0,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple:
        self.did.append("graph")
        for work in self.graphs[graph]:
            work()
        return (0,)


class FakeTrt:
    """The module `tensorrt`, whose one model gives y = x + shift in fp32 and the sum of its rows as uint8."""

    __version__ = "99.0"
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)
    ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0})

    def __init__(self, cuda: FakeCuda, largest: int = 4) -> None:
        self.__name__ = "tensorrt"
        self.cuda, self.largest = cuda, largest
        self.refuses: set[bytes] = set()
        self.contexts = 0
        self.fails = ""
        self.log: Any = None
        self.streamed: int | None = None

    def Runtime(self, log: Any) -> Any:
        self.log = log
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: None if plan in self.refuses else FakePlan(self))

    def nptype(self, kind: str) -> type:
        return {"float": np.float32, "uint8": np.uint8}[kind]


class FakeRtx(FakeTrt):
    """The module `tensorrt_rtx`: compiles kernels when a context is made, and keeps them in a runtime cache."""

    IRuntimeCache = object
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE=1)

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__(cuda)
        self.__name__ = "tensorrt_rtx"
        self.compiled = 0


class FakeConfig:
    """A runtime configuration of TensorRT for RTX, and its cache in one."""

    cuda_graph_strategy = 0

    def __init__(self, trt: FakeTrt) -> None:
        self.trt, self.kernels = trt, b""

    def set_execution_context_allocation_strategy(self, strategy: int) -> None:
        assert strategy == 2

    def create_runtime_cache(self) -> "FakeConfig":
        return self

    def set_runtime_cache(self, kernels: "FakeConfig") -> None:
        assert kernels is self

    def deserialize(self, data: bytes) -> bool:
        self.kernels = data
        return True

    def serialize(self) -> bytes:
        return self.kernels


class FakePlan:
    """An engine: one profile for a batch of 1, one for 2 to `largest`."""

    num_io_tensors, num_optimization_profiles = 4, 2
    names = ("x", "shift", "y", "rows")

    def __init__(self, trt: FakeTrt) -> None:
        self.trt = trt

    def get_tensor_name(self, i: int) -> str:
        return self.names[i]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in ("x", "shift") else "output"

    def get_tensor_shape(self, name: str) -> tuple:
        return {"x": (-1, 3), "shift": (-1,), "y": (-1, 3), "rows": (-1,)}[name]

    def get_tensor_dtype(self, name: str) -> str:
        return "uint8" if name == "rows" else "float"

    def get_tensor_profile_shape(self, name: str, number: int) -> tuple:
        low, high = (1, 1) if number == 0 else (2, self.trt.largest)
        rest = self.get_tensor_shape(name)[1:]
        return (low, *rest), (high, *rest), (high, *rest)

    def create_runtime_config(self) -> FakeConfig:
        return FakeConfig(self.trt)

    def create_execution_context(self, how: "int | FakeConfig") -> "FakeContext":
        if isinstance(how, FakeConfig):
            assert how.cuda_graph_strategy == 1 and isinstance(self.trt, FakeRtx)
            if not how.kernels:
                self.trt.compiled += 1
                how.kernels = b"kernels"
        else:
            assert how == 2
        self.trt.contexts += 1
        return FakeContext(self.trt)

    streamable_weights_size, device_memory_size_v2 = 1 << 33, 1 << 20

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight_streaming_budget_v2":
            self.trt.streamed = value
        super().__setattr__(name, value)


class FakeContext:
    """Runs the model on the memory at its addresses."""

    def __init__(self, trt: FakeTrt) -> None:
        self.trt, self.cuda = trt, trt.cuda
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.activations: tuple[int, int] | None = None
        self.profile: int | None = None

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        self.profile = number
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if shape == (4, 3) and self.trt.largest == 99:
            self.trt.log.log(1, "not this shape")
            return False
        self.shapes[name] = shape
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return 1000 * self.shapes["x"][0]

    def set_device_memory(self, pointer: int, size: int) -> None:
        assert size >= self.update_device_memory_size_for_shapes()
        self.activations = pointer, size

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"] if name == "y" else self.shapes["x"][:1]

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.trt.fails:
            self.trt.log.log(1, f"{self.trt.fails}\nmore of it")
            return False
        if self.cuda.capturing is not None and not self.cuda.capturable:
            return False
        assert self.activations is not None and self.activations[0] in self.cuda.memory
        assert (self.profile == 0) == (self.shapes["x"][0] == 1)
        if self.cuda.capturing is not None:
            self.cuda.capturing.append(self.work)
            return True
        self.cuda.did.append("enqueue")
        self.work()
        return True

    def work(self) -> None:
        x, shift, y, rows = (self.view(name) for name in ("x", "shift", "y", "rows"))
        y[...] = x + shift[:, None]
        rows[...] = y.sum(1)

    def view(self, name: str) -> np.ndarray:
        pointer = self.addresses[name]
        assert pointer in self.cuda.memory, f"{name} was freed"
        shape = self.shapes.get(name) or self.get_tensor_shape(name)
        dtype = np.dtype(np.uint8 if name == "rows" else np.float32)
        return np.frombuffer((ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)).from_address(pointer), dtype).reshape(shape)
