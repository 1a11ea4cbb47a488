"""TensorRT, or TensorRT for RTX, on an NVIDIA GPU (engine `tensorrt`)."""

import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from snoopi_rt.engines import ENGINES
from snoopi_rt.engines.base import EngineOptions, TensorSpec, check_inputs, engine_errors
from snoopi_rt.engines.compiled_cache import model_files
from snoopi_rt.engines.gpu import Gpu, GpuArray
from snoopi_rt.engines.tensorrt_plan import Kept, KeptPlan, is_rtx, library, logged_reason, logger
from snoopi_rt.errors import EngineError, how_to_install

NO_RTX = {(8, 0), (9, 0), (10, 0), (10, 3)}
"""Compute capabilities of data-centre GPUs, for which TensorRT for RTX makes no kernels (A100, H100, B200, B300)."""
LANES = 16
"""Combinations of input shapes that are kept ready; what was not used for longest goes first."""
ROOM = 1.5
"""How many times its weights the GPU's memory must be, else they are streamed from the host."""
MARGIN = 256 * 2**20
"""Bytes that are left free beside weights that are streamed."""

Arrays = Mapping[str, np.ndarray | GpuArray]


class Refused(Exception):
    """TensorRT did not do what it was asked; why is in what it logged."""


def accepted(answer: Any) -> None:
    """Raises Refused for an answer that means no."""
    if not answer:
        raise Refused


class TrtEngine:
    """An ONNX file in TensorRT. What it returns lies on the GPU, and it takes what lies there as it is.

    Each combination of input shapes has an execution context and buffers of its own, so that nothing moves between two calls and the
    third one is a CUDA graph that the second has recorded. They share one piece of memory for activations.
    """

    def __init__(self, path: Path, options: EngineOptions) -> None:
        trt = library(ENGINES[options.name].package)
        self._gpu = gpu = Gpu.open(options.name)
        label = f"{'TensorRT for RTX' if is_rtx(trt) else 'TensorRT'} {trt.__version__}"
        if is_rtx(trt) and gpu.capability in NO_RTX:
            raise EngineError(f"{label} does not run on {gpu.name}: {how_to_install('tensorrt')}")
        self.provider = f"{label} on {gpu.name}"
        weights = sum(file.stat().st_size for file in model_files(path))
        described = f"{gpu.name}, {gpu.capability}, driver {gpu.driver}"
        # By all of its memory, not by what is free at the moment: a plan for the other case is another, which takes minutes.
        plan = KeptPlan(trt, path, options, described, streaming=gpu.memory()[1] < ROOM * weights)
        log, self._errors = logger(trt)
        with engine_errors(f"engine {options.name!r} cannot load {path.name}"):
            runtime = trt.Runtime(log)
            data = plan.read()
            engine = runtime.deserialize_cuda_engine(data)
            # Of another version, or damaged before it was written; a lack of memory is no reason to spend minutes once more.
            if engine is None and plan.kept and gpu.memory()[0] > ROOM * len(data):
                plan.drop()
                engine = runtime.deserialize_cuda_engine(plan.read())
            if engine is None:
                raise EngineError(f"engine {options.name!r} cannot load {path.name}: {logged_reason(self._errors)}")
            if plan.streaming:
                # TensorRT's own budget comes to Python in 32 bits.
                room = gpu.memory()[0] - engine.device_memory_size_v2 - MARGIN
                engine.weight_streaming_budget_v2 = max(0, min(engine.streamable_weights_size, room))
            self._contexts: Any = _Contexts(trt, engine, Kept(options.cache, f"{plan.name}-kernels") if options.cache else None)
        self._trt, self._engine = trt, engine
        self._kept_alive: Any = log, runtime
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        given = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.inputs = tuple(self._spec(name) for name in given)
        self.outputs = tuple(self._spec(name) for name in names if name not in given)
        self._lock = threading.Lock()
        self._lanes: dict[tuple, _Lane] = {}
        self._activations: GpuArray | None = None

    def __call__(self, **arrays: np.ndarray | GpuArray) -> dict[str, GpuArray]:
        check_inputs(self.inputs, arrays)
        with self._lock, engine_errors("TensorRT failed"):
            if self._engine is None:
                raise EngineError("this engine is closed")
            self._errors.clear()
            try:
                return self._lane(arrays).run(arrays)
            except Refused:
                raise EngineError(f"TensorRT failed: {logged_reason(self._errors)}") from None

    def close(self) -> None:
        with self._lock, engine_errors("TensorRT failed"):
            if self._engine is not None:
                self._forget_lanes()
                self._contexts.keep_kernels()
                self._activations = self._engine = self._contexts = self._kept_alive = None

    def _lane(self, arrays: Arrays) -> "_Lane":
        """What is ready for these shapes, made when they are first seen. Raises EngineError for shapes that the plan does not take."""
        shapes = tuple(tuple(arrays[spec.name].shape) for spec in self.inputs)
        lane = self._lanes.pop(shapes, None)
        if lane is None:
            lane = self._new_lane(shapes)
        self._lanes[shapes] = lane  # the last used is the last
        if len(self._lanes) > LANES:
            self._gpu.wait()
            self._lanes.pop(next(iter(self._lanes))).close()
        return lane

    def _new_lane(self, shapes: tuple[tuple[int, ...], ...]) -> "_Lane":
        profile = self._profile(shapes)
        context = self._contexts.make()
        accepted(context is not None and context.set_optimization_profile_async(profile, int(self._gpu.stream)))
        for spec, shape in zip(self.inputs, shapes, strict=True):
            accepted(context.set_input_shape(spec.name, shape))
        size = int(context.update_device_memory_size_for_shapes())
        accepted(size > 0 or not self._errors)
        if self._activations is None or self._activations.nbytes < size:
            # The others' graphs know the old memory by its address.
            self._forget_lanes()
            self._activations = None  # before the larger one is asked for
            self._activations = self._gpu.array((size,), np.dtype(np.uint8))
        context.set_device_memory(self._activations.pointer, self._activations.nbytes)
        return _Lane(self._gpu, context, self.inputs, shapes, self.outputs, self._contexts.records)

    def _profile(self, shapes: tuple[tuple[int, ...], ...]) -> int:
        for number in range(self._engine.num_optimization_profiles):
            ranges = [self._engine.get_tensor_profile_shape(spec.name, number) for spec in self.inputs]
            if all(
                low <= size <= high
                for (least, _, most), shape in zip(ranges, shapes, strict=True)
                for low, size, high in zip(least, shape, most, strict=True)
            ):
                return number
        given = ", ".join(f"{spec.name} {shape}" for spec, shape in zip(self.inputs, shapes, strict=True))
        raise EngineError(f"engine 'tensorrt' was not built for inputs of these shapes: {given}")

    def _forget_lanes(self) -> None:
        self._gpu.wait()
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()

    def _spec(self, name: str) -> TensorSpec:
        shape = tuple(None if size < 0 else size for size in self._engine.get_tensor_shape(name))
        return TensorSpec(name, shape, np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name))).name)


class _Contexts:
    """Makes execution contexts. TensorRT for RTX compiles their kernels on the GPU, which are kept, and records graphs itself."""

    def __init__(self, trt: Any, engine: Any, kernels: Kept | None) -> None:
        self._engine, self._strategy = engine, trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._config = self._compiled = self._kernels = None
        self.records = not is_rtx(trt)
        if is_rtx(trt):
            self._config = engine.create_runtime_config()
            self._config.set_execution_context_allocation_strategy(self._strategy)
            self._config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self._compiled, self._kernels = self._config.create_runtime_cache(), kernels
            if kernels is not None and (data := kernels.read()):
                self._compiled.deserialize(data)
            self._config.set_runtime_cache(self._compiled)

    def make(self) -> Any:
        """A context without memory for activations."""
        return self._engine.create_execution_context(self._strategy if self._config is None else self._config)

    def keep_kernels(self) -> None:
        """Keeps the kernels that were compiled so far."""
        if self._compiled is not None and self._kernels is not None:
            self._kernels.write(bytes(self._compiled.serialize()))


class _Lane:
    """An execution context with one shape for each input, and the buffers that it reads and writes."""

    def __init__(
        self,
        gpu: Gpu,
        context: Any,
        inputs: tuple[TensorSpec, ...],
        shapes: tuple[tuple[int, ...], ...],
        outputs: tuple[TensorSpec, ...],
        records: bool,
    ) -> None:
        self._gpu, self._context, self._records = gpu, context, records
        self._inputs = {spec.name: gpu.array(shape, np.dtype(spec.dtype)) for spec, shape in zip(inputs, shapes, strict=True)}
        self._outputs = {spec.name: gpu.array(tuple(context.get_tensor_shape(spec.name)), np.dtype(spec.dtype)) for spec in outputs}
        for name, buffer in {**self._inputs, **self._outputs}.items():
            accepted(context.set_tensor_address(name, buffer.pointer))
        self._staging = {name: gpu.pinned(buffer.nbytes) for name, buffer in self._inputs.items()}
        (self._uploaded,) = gpu.call(gpu.cuda.cudaEventCreateWithFlags, gpu.cuda.cudaEventDisableTiming)
        self._runs = 0
        self._graph: Any = None

    def run(self, arrays: Arrays) -> dict[str, GpuArray]:
        """The outputs, in arrays of their own."""
        self._upload(arrays)
        if self._graph is not None:
            self._gpu.launch(self._graph)
        else:
            self._enqueue(self._gpu.stream)
            self._runs += 1
            if self._records and self._runs == 2:  # the first run may still prepare something
                self._record()
        found = {}
        for name, buffer in self._outputs.items():
            found[name] = copy = self._gpu.array(buffer.shape, buffer.dtype)
            self._gpu.copy(copy.pointer, buffer.pointer, copy.nbytes)
        return found

    def _record(self) -> None:
        """Makes a graph of the run, unless something in the model cannot be recorded: then it goes on without."""
        self._gpu.wait()
        with suppress(Refused, RuntimeError):
            self._graph = self._gpu.recorded(self._enqueue)

    def close(self) -> None:
        """Frees everything; nothing of it may still be running."""
        if self._graph is not None:
            self._gpu.forget(self._graph)
        self._gpu.call(self._gpu.cuda.cudaEventDestroy, self._uploaded)
        self._graph = self._context = None
        self._inputs.clear()
        self._outputs.clear()

    def _upload(self, arrays: Arrays) -> None:
        """Copies the inputs into their buffers."""
        gpu = self._gpu
        # The copies of the call before this one must be done before their source changes.
        gpu.call(gpu.cuda.cudaEventSynchronize, self._uploaded)
        for name, buffer in self._inputs.items():
            array, source = arrays[name], self._staging[name]
            if isinstance(array, GpuArray):
                gpu.copy(buffer.pointer, array.pointer, buffer.nbytes)
            else:
                source.array(buffer.shape, buffer.dtype)[...] = array
                gpu.copy(buffer.pointer, source.pointer, buffer.nbytes)
        gpu.call(gpu.cuda.cudaEventRecord, self._uploaded, gpu.stream)

    def _enqueue(self, stream: Any) -> None:
        accepted(self._context.execute_async_v3(int(stream)))
