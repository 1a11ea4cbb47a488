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
from snoopi_rt.engines.tensorrt_plan import CachedBytes, CachedPlan, import_tensorrt, is_rtx, logged_reason, logger
from snoopi_rt.errors import EngineError, how_to_install

RTX_UNSUPPORTED = {(8, 0), (9, 0), (10, 0), (10, 3)}
"""Compute capabilities of data-centre GPUs, for which TensorRT for RTX has no kernels (A100, H100, B200, B300)."""
MAX_CONTEXTS = 16
"""Combinations of input shapes that are kept ready; the least recently used is dropped."""
STREAMING_RATIO = 1.5
"""GPU memory over weights: below it, weights are streamed from the host."""
STREAMING_MARGIN = 256 * 2**20
"""Bytes that are left free beside streamed weights."""

InputArrays = Mapping[str, np.ndarray | GpuArray]


class CallFailed(Exception):
    """A call of TensorRT returned failure; it logged the reason."""


def require(success: Any) -> None:
    """Raises CallFailed if a call of TensorRT returned failure."""
    if not success:
        raise CallFailed


class TrtEngine:
    """An ONNX file in TensorRT. Its outputs stay on the GPU, and it takes arrays on the GPU without a copy to the host.

    Each combination of input shapes has its own execution context and buffers at fixed addresses, so that its second call is captured as a
    CUDA graph, which later calls launch. All contexts share one block of memory for activations.
    """

    def __init__(self, path: Path, options: EngineOptions) -> None:
        trt = import_tensorrt(ENGINES[options.name].package)
        self._gpu = gpu = Gpu.open(options.name)
        label = f"{'TensorRT for RTX' if is_rtx(trt) else 'TensorRT'} {trt.__version__}"
        if is_rtx(trt) and gpu.capability in RTX_UNSUPPORTED:
            raise EngineError(f"{label} does not run on {gpu.name}: {how_to_install('tensorrt')}")
        self.provider = f"{label} on {gpu.name}"
        weights = sum(file.stat().st_size for file in model_files(path))
        described = f"{gpu.name}, {gpu.capability}, driver {gpu.driver}"
        # By total, not by free memory: a plan with and one without streaming differ, and each takes minutes to build.
        plan = CachedPlan(trt, path, options, described, streaming=gpu.memory()[1] < STREAMING_RATIO * weights)
        log, self._errors = logger(trt)
        with engine_errors(f"engine {options.name!r} cannot load {path.name}"):
            runtime = trt.Runtime(log)
            data = plan.read()
            engine = runtime.deserialize_cuda_engine(data)
            # Of another version, or damaged before it was written. Lack of memory is no reason to build it again.
            if engine is None and plan.cached and gpu.memory()[0] > STREAMING_RATIO * len(data):
                plan.drop()
                engine = runtime.deserialize_cuda_engine(plan.read())
            if engine is None:
                raise EngineError(f"engine {options.name!r} cannot load {path.name}: {logged_reason(self._errors)}")
            if plan.streaming:
                # TensorRT's own estimate of the budget reaches Python in 32 bits.
                budget = gpu.memory()[0] - engine.device_memory_size_v2 - STREAMING_MARGIN
                engine.weight_streaming_budget_v2 = max(0, min(engine.streamable_weights_size, budget))
            self._factory: Any = _ContextFactory(trt, engine, CachedBytes(options.cache, f"{plan.name}-kernels") if options.cache else None)
        self._trt, self._engine = trt, engine
        self._owners: Any = log, runtime  # must outlive the engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.inputs = tuple(self._spec(name) for name in inputs)
        self.outputs = tuple(self._spec(name) for name in names if name not in inputs)
        self._lock = threading.Lock()
        self._contexts: dict[tuple, _BoundContext] = {}
        self._activations: GpuArray | None = None

    def __call__(self, **arrays: np.ndarray | GpuArray) -> dict[str, GpuArray]:
        check_inputs(self.inputs, arrays)
        with self._lock, engine_errors("TensorRT failed"):
            if self._engine is None:
                raise EngineError("this engine is closed")
            self._errors.clear()
            try:
                return self._context_for(arrays).run(arrays)
            except CallFailed:
                raise EngineError(f"TensorRT failed: {logged_reason(self._errors)}") from None

    def close(self) -> None:
        with self._lock, engine_errors("TensorRT failed"):
            if self._engine is not None:
                self._drop_contexts()
                self._factory.save_kernels()
                self._activations = self._engine = self._factory = self._owners = None

    def _context_for(self, arrays: InputArrays) -> "_BoundContext":
        """The context for these shapes, made when they are first used. Raises EngineError for shapes that the plan does not take."""
        shapes = tuple(tuple(arrays[spec.name].shape) for spec in self.inputs)
        bound = self._contexts.pop(shapes, None)
        if bound is None:
            bound = self._new_context(shapes)
        self._contexts[shapes] = bound  # most recently used last
        if len(self._contexts) > MAX_CONTEXTS:
            self._gpu.wait()
            self._contexts.pop(next(iter(self._contexts))).close()
        return bound

    def _new_context(self, shapes: tuple[tuple[int, ...], ...]) -> "_BoundContext":
        profile = self._profile(shapes)
        context = self._factory.make()
        require(context is not None and context.set_optimization_profile_async(profile, int(self._gpu.stream)))
        for spec, shape in zip(self.inputs, shapes, strict=True):
            require(context.set_input_shape(spec.name, shape))
        size = int(context.update_device_memory_size_for_shapes())
        require(size > 0 or not self._errors)
        if self._activations is None or self._activations.nbytes < size:
            # The graphs of the others hold the old memory's address.
            self._drop_contexts()
            self._activations = None  # freed before the larger one is allocated
            self._activations = self._gpu.array((size,), np.dtype(np.uint8))
        context.set_device_memory(self._activations.pointer, self._activations.nbytes)
        return _BoundContext(self._gpu, context, self.inputs, shapes, self.outputs, self._factory.captures)

    def _profile(self, shapes: tuple[tuple[int, ...], ...]) -> int:
        for number in range(self._engine.num_optimization_profiles):
            ranges = [self._engine.get_tensor_profile_shape(spec.name, number) for spec in self.inputs]
            if all(
                low <= size <= high
                for (least, _, most), shape in zip(ranges, shapes, strict=True)
                for low, size, high in zip(least, shape, most, strict=True)
            ):
                return number
        listed = ", ".join(f"{spec.name} {shape}" for spec, shape in zip(self.inputs, shapes, strict=True))
        raise EngineError(f"engine 'tensorrt' was not built for inputs of these shapes: {listed}")

    def _drop_contexts(self) -> None:
        self._gpu.wait()
        for bound in self._contexts.values():
            bound.close()
        self._contexts.clear()

    def _spec(self, name: str) -> TensorSpec:
        shape = tuple(None if size < 0 else size for size in self._engine.get_tensor_shape(name))
        return TensorSpec(name, shape, np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name))).name)


class _ContextFactory:
    """Makes execution contexts. TensorRT for RTX compiles their kernels on the GPU, which are cached, and captures graphs itself."""

    def __init__(self, trt: Any, engine: Any, kernels: CachedBytes | None) -> None:
        self._engine, self._strategy = engine, trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._config = self._compiled = self._kernels = None
        self.captures = not is_rtx(trt)
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

    def save_kernels(self) -> None:
        """Caches the kernels that were compiled so far."""
        if self._compiled is not None and self._kernels is not None:
            self._kernels.write(bytes(self._compiled.serialize()))


class _BoundContext:
    """An execution context for fixed input shapes, with the buffers that it reads and writes."""

    def __init__(
        self,
        gpu: Gpu,
        context: Any,
        inputs: tuple[TensorSpec, ...],
        shapes: tuple[tuple[int, ...], ...],
        outputs: tuple[TensorSpec, ...],
        captures: bool,
    ) -> None:
        self._gpu, self._context, self._captures = gpu, context, captures
        self._inputs = {spec.name: gpu.array(shape, np.dtype(spec.dtype)) for spec, shape in zip(inputs, shapes, strict=True)}
        self._outputs = {spec.name: gpu.array(tuple(context.get_tensor_shape(spec.name)), np.dtype(spec.dtype)) for spec in outputs}
        for name, buffer in {**self._inputs, **self._outputs}.items():
            require(context.set_tensor_address(name, buffer.pointer))
        self._staging = {name: gpu.pinned(buffer.nbytes) for name, buffer in self._inputs.items()}
        (self._uploaded,) = gpu.call(gpu.cuda.cudaEventCreateWithFlags, gpu.cuda.cudaEventDisableTiming)
        self._runs = 0
        self._graph: Any = None

    def run(self, arrays: InputArrays) -> dict[str, GpuArray]:
        """The outputs, copied to new arrays."""
        self._upload(arrays)
        if self._graph is not None:
            self._gpu.launch(self._graph)
        else:
            self._enqueue(self._gpu.stream)
            self._runs += 1
            if self._captures and self._runs == 2:  # the first run may still initialise something
                self._capture()
        outputs = {}
        for name, buffer in self._outputs.items():
            outputs[name] = copy = self._gpu.array(buffer.shape, buffer.dtype)
            self._gpu.copy(copy.pointer, buffer.pointer, copy.nbytes)
        return outputs

    def _capture(self) -> None:
        """Captures the run as a graph, unless something in the model cannot be captured: then it continues without."""
        self._gpu.wait()
        with suppress(CallFailed, RuntimeError):
            self._graph = self._gpu.capture(self._enqueue)

    def close(self) -> None:
        """Frees everything; the stream must be idle."""
        if self._graph is not None:
            self._gpu.destroy(self._graph)
        self._gpu.call(self._gpu.cuda.cudaEventDestroy, self._uploaded)
        self._graph = self._context = None
        self._inputs.clear()
        self._outputs.clear()

    def _upload(self, arrays: InputArrays) -> None:
        """Copies the inputs into their buffers."""
        gpu = self._gpu
        # The previous call's uploads must be done before their source changes.
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
        require(self._context.execute_async_v3(int(stream)))
