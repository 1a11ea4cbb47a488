"""OpenVINO on the CPU (engine `openvino`)."""

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from snoopi_rt.engines.base import EngineError, TensorSpec, check_inputs, engine_errors


class OvEngine:
    """An ONNX file or OpenVINO IR, compiled for the CPU; precision "bf16" computes in bfloat16 where the processor can, others in float32.

    A call takes an idle infer request, or makes one: as many exist as threads ever called at once.
    """

    def __init__(self, path: Path, name: str, precision: str | None, threads: int | None, cache: Path | None) -> None:
        with engine_errors(f"engine {name!r} cannot use OpenVINO"):
            import openvino

            core = openvino.Core()
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            # Every shape that a dynamic axis ever had leaves compiled layers behind: 5,000 of them unless bounded.
            "CPU_RUNTIME_CACHE_CAPACITY": "1000",
            # Else activations beside int8 weights would be rounded too, together for a whole batch.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        if cache is not None:
            options["CACHE_DIR"] = str(cache)
        with engine_errors(f"engine {name!r} cannot load {path.name}"):
            compiled = core.compile_model(str(path), "CPU", options)
            self.provider = f"CPU {compiled.get_property('INFERENCE_PRECISION_HINT').to_string()}"
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
            values = request.infer(
                {name: np.ascontiguousarray(array) for name, array in arrays.items()}, share_inputs=True, share_outputs=True
            )
            # The request's own buffers are overwritten by its next call: the caller gets copies.
            outputs = {spec.name: values[index].copy() for index, spec in enumerate(self.outputs)}
            self._idle.append(request)
        return outputs

    def close(self) -> None:
        self._compiled = None
        self._idle.clear()


def _spec(port: Any) -> TensorSpec:
    shape = tuple(size.get_length() if size.is_static else None for size in port.partial_shape)
    return TensorSpec(port.any_name, shape, np.dtype(port.element_type.to_dtype()).name)
