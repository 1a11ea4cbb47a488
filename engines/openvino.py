"""OpenVINO on the CPU (engine `openvino`)."""

import sys
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from snoopi_rt.engines.base import EngineOptions, TensorSpec, check_inputs, engine_errors
from snoopi_rt.engines.compiled_cache import CompiledModels, compiled_name, model_files
from snoopi_rt.errors import EngineError

BF16 = ("bf16", "int8")
"""The precisions with bf16 arithmetic if the processor has it, "int8" between its integer products."""

NO_BF16 = " (this processor has no bf16)"


class OvEngine:
    """An ONNX file or OpenVINO IR, compiled for the CPU with the arithmetic of `arithmetic`.

    A call takes an idle infer request, or makes one: as many exist as threads ever called at once.
    """

    def __init__(self, path: Path, options: EngineOptions) -> None:
        name, cache = options.name, options.cache
        with engine_errors(f"engine {name!r} cannot use OpenVINO"):
            openvino = import_openvino()
            core = openvino.Core()
            core.set_property({"ENABLE_MMAP": options.mapped})
            hint, remark = arithmetic(options.precision, core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        properties: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": options.threads,
            # Every shape of a dynamic axis leaves compiled layers behind, 5,000 of them by default.
            "CPU_RUNTIME_CACHE_CAPACITY": "1000",
            # Otherwise activations beside int8 weights would be rounded too, with one scale for a whole batch.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }

        def compile_model(folder: Path | None) -> Any:
            # The whole model is cached, weights included: one without (CACHE_MODE OPTIMIZE_SIZE) loads, and fails in its first call.
            return core.compile_model(str(path), "CPU", properties | ({} if folder is None else {"CACHE_DIR": str(folder)}))

        compiled = None
        if cache is not None:
            with suppress(EngineError), engine_errors("the cache is of no use"):
                compiled = _compile_cached(
                    cache, compiled_name(path, options.key, "openvino", openvino.__version__, hint), path, compile_model
                )
        with engine_errors(f"engine {name!r} cannot load {path.name}"):
            compiled = compiled or compile_model(None)
            self.provider = f"CPU {compiled.get_property('INFERENCE_PRECISION_HINT').to_string()}{remark}"
            self.inputs = tuple(_spec(port) for port in compiled.inputs)
            self.outputs = tuple(_spec(port) for port in compiled.outputs)
        self._compiled: Any = compiled
        self._idle: deque[Any] = deque()

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        compiled = self._compiled
        if compiled is None:
            raise EngineError("this engine is closed")
        check_inputs(self.inputs, arrays)
        with engine_errors("OpenVINO failed"):
            try:
                request = self._idle.pop()
            except IndexError:
                request = compiled.create_infer_request()
            inputs: dict[Any, Any] = {index: np.ascontiguousarray(arrays[spec.name]) for index, spec in enumerate(self.inputs)}
            values = request.infer(inputs, share_inputs=True, share_outputs=True)
            # The next call overwrites the request's own buffers: the caller gets copies.
            outputs = {spec.name: values[index].copy() for index, spec in enumerate(self.outputs)}
            if self._compiled is not None:
                self._idle.append(request)
            # If the engine was closed meanwhile, this thread holds them, and must not free them once the process ends.
            del values, request, compiled
        return outputs

    def close(self) -> None:
        self._compiled = None
        self._idle.clear()


def import_openvino() -> Any:
    """The module `openvino`, without the report that it sends at import if `openvino_telemetry` is installed.

    That package is hidden meanwhile, unless the application has imported it itself; it can be imported again afterwards.
    """
    hidden = "openvino_telemetry" not in sys.modules
    if hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # Python treats it as not installed
    try:
        import openvino
    finally:
        if hidden:
            sys.modules.pop("openvino_telemetry", None)
    return openvino


def arithmetic(precision: str | None, capabilities: Collection[str]) -> tuple[str, str]:
    """OpenVINO's precision hint for a variant's precision, and a remark if the processor does not have that arithmetic."""
    if precision not in BF16:
        return "f32", ""
    return ("bf16", "") if "BF16" in capabilities else ("f32", NO_BF16)


def _compile_cached(cache: CompiledModels, name: str, path: Path, compile_model: Callable[[Path | None], Any]) -> Any:
    """The model compiled before, or compiled now into the cache."""
    folder = cache.find(name)
    if folder is not None:
        with suppress(EngineError), engine_errors("the cached model is damaged"):
            return compile_model(folder)
        cache.drop(name)
    with cache.fill(name, sum(file.stat().st_size for file in model_files(path))) as new:
        return compile_model(new)


def _spec(port: Any) -> TensorSpec:
    shape = tuple(size.get_length() if size.is_static else None for size in port.partial_shape)
    return TensorSpec(_name(port), shape, np.dtype(port.element_type.to_dtype()).name)


def _name(port: Any) -> str:
    """The port's own name in the graph: `any_name` may be that of an operator which only forwards its tensor."""
    own = port.node.friendly_name
    own = own.rpartition("/sink_port_")[0] or own  # of an output
    return own if own in port.names else port.any_name
