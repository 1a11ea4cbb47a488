"""ONNX Runtime, on the CPU (engine `cpu`) and on CUDA (engine `cuda`)."""

from pathlib import Path
from typing import Any

import numpy as np

from snoopi_rt.engines import conflict
from snoopi_rt.engines.base import EngineError, EngineMissing, TensorSpec, check_inputs, engine_errors

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
}


class OrtEngine:
    """An ONNX file in an ONNX Runtime session.

    The precision is the file's own and nothing is cached, so those two arguments change nothing here.
    """

    def __init__(self, path: Path, name: str, precision: str | None, threads: int | None, cache: Path | None) -> None:
        provider = PROVIDERS[name]
        try:
            with engine_errors(f"engine {name!r} cannot use ONNX Runtime"):
                import onnxruntime

                available = onnxruntime.get_available_providers()
        except EngineError as error:
            raise EngineError(f"{error}{conflict()}") from error
        if provider not in available:
            needs = f"engine {name!r} needs ONNX Runtime with {provider}, which the one installed has not{conflict()}"
            raise EngineMissing(f'{needs}: pip uninstall onnxruntime, then pip install "snoopi-rt[{name}]"')
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        # Weights may be int8 on disk with activations in float: with this, DequantizeLinear of a constant is folded at load.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        # Else the idle threads of one graph spin on the cores that the next graph needs: 16 ms an image instead of 26 on two cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        with engine_errors(f"engine {name!r} cannot load {path.name}"):
            session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        # A provider that cannot start is replaced by the CPU without an error: only the session says what is used.
        self.provider = session.get_providers()[0]
        if self.provider != provider:
            raise EngineError(f"engine {name!r}: ONNX Runtime could not start {provider} and fell back to the CPU{conflict()}")
        self.inputs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_spec(node) for node in session.get_outputs())
        self._session: Any = session

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        session = self._session
        if session is None:
            raise EngineError("this engine is closed")
        check_inputs(self.inputs, arrays)
        with engine_errors("ONNX Runtime failed"):
            values = session.run(None, arrays)
        return {spec.name: value for spec, value in zip(self.outputs, values, strict=True)}

    def close(self) -> None:
        self._session = None


def _spec(node: Any) -> TensorSpec:
    if node.type not in DTYPES:
        raise EngineError(f"{node.name!r} has type {node.type}, which no engine of snoopi-rt takes")
    return TensorSpec(node.name, tuple(size if isinstance(size, int) else None for size in node.shape), DTYPES[node.type])
