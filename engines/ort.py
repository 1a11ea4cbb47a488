"""ONNX Runtime, on the CPU (engine `cpu`) and on CUDA (engine `cuda`)."""

import io
import json
import os
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from snoopi_rt.engines import conflict
from snoopi_rt.engines.base import EngineOptions, TensorSpec, check_inputs, engine_errors
from snoopi_rt.engines.compiled_cache import CompiledModels, compiled_name, model_files, processor
from snoopi_rt.engines.ort_binding import BoundSession
from snoopi_rt.errors import EngineError, EngineMissing, how_to_install

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
MIN_CACHED = 64 * 2**20
"""Bytes: a smaller model is optimised again in the time that the cache takes to load it."""
OPTIMISED = "model.onnx"
SETTINGS = {
    # Weights may be int8 on disk with activations in float: with this, DequantizeLinear of a constant is folded at load.
    "session.disable_quant_qdq": "1",
    # Otherwise idle threads of one graph spin on the cores that the next graph needs: 26 ms per image instead of 16 on two cores.
    "session.force_spinning_stop": "1",
}
UINT8_WEIGHTS = {"session.x64quantprecision": "1"}
"""Weights become uint8: correct even if int8 products overflow (x86 without VNNI), but two to three times slower."""
SAVE_SETTINGS = {
    "session.optimized_model_external_initializers_file_name": f"{OPTIMISED}.data",
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    # Weights in the layout of the processor's kernels: the next start maps them into memory instead of copying them.
    "session.save_external_prepacked_constant_initializers": "1",
}


class OrtEngine:
    """An ONNX file in an ONNX Runtime session. The precision is the file's own: that option changes nothing here.

    Optimising a large model takes ONNX Runtime longer than running it, so `cpu` keeps the outcome in the cache.
    """

    def __init__(self, path: Path, options: EngineOptions) -> None:
        name, threads, cache = options.name, options.threads, options.cache
        provider = PROVIDERS[name]
        try:
            with engine_errors(f"engine {name!r} cannot use ONNX Runtime"):
                onnxruntime = import_onnxruntime()
                available = onnxruntime.get_available_providers()
        except EngineError as error:
            raise EngineError(f"{error}{conflict()}") from error
        if provider not in available:
            needs = f"engine {name!r} needs ONNX Runtime with {provider}, which the installed one lacks{conflict()}"
            raise EngineMissing(f"{needs}: pip uninstall onnxruntime, then {how_to_install(name)}")
        session, self._bound = None, None
        if cache is not None and name == "cpu":
            with suppress(EngineError), engine_errors("the cache is of no use"):
                session = _cached_session(path, threads, cache, options.key, options.mapped)
        with engine_errors(f"engine {name!r} cannot load {path.name}"):
            if name == "cuda":
                self._bound = BoundSession(partial(_cuda_session, path, threads, options.mapped), "cuda")
                session = self._bound.session
            elif session is None:
                session = _session(path, _options(threads), options.mapped, providers=[provider])
            self.inputs = tuple(_spec(node) for node in session.get_inputs())
            self.outputs = tuple(_spec(node) for node in session.get_outputs())
        # A provider that cannot start is replaced by the CPU without an error: only the session says what is used.
        self.provider = session.get_providers()[0]
        if self.provider != provider:
            raise EngineError(f"engine {name!r}: ONNX Runtime could not start {provider} and fell back to the CPU{conflict()}")
        self._session: Any = None if self._bound is not None else session

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        session, bound = self._session, self._bound
        if session is None and bound is None:
            raise EngineError("this engine is closed")
        check_inputs(self.inputs, arrays)
        with engine_errors("ONNX Runtime failed"):
            if bound is not None:
                return bound(arrays, self.outputs)
            values = session.run(None, arrays)
            # If the engine was closed meanwhile, this thread holds the session, and must not free it once the process ends.
            del session
        return {spec.name: value for spec, value in zip(self.outputs, values, strict=True)}

    def close(self) -> None:
        bound, self._session, self._bound = self._bound, None, None
        if bound is not None:
            bound.close()


def import_onnxruntime() -> Any:
    """The module `onnxruntime`, without its telemetry, which would also leave a database in the user's folders."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def _session(path: Path, options: Any, mapped: bool, **more: Any) -> Any:
    """A session of the model; unless `mapped`, its weights are read into memory."""
    if not mapped and (weights := {file.name: file.read_bytes() for file in model_files(path)[1:]}):
        options.add_external_initializers_from_files_in_memory(list(weights), list(weights.values()), list(map(len, weights.values())))
    return _open_session(path, options, **more)


def _open_session(path: Path, options: Any, **more: Any) -> Any:
    """A session. With its fallback, ONNX Runtime would print an error and continue on the CPU, even after an error of the CPU provider."""
    from onnxruntime import InferenceSession

    return InferenceSession(str(path), options, enable_fallback=0, **more)


def _cuda_session(path: Path, threads: int, mapped: bool, graphs: bool) -> Any:
    """A session on the GPU."""
    import onnxruntime

    with redirect_stdout(io.StringIO()):  # loads CUDA and cuDNN from their packages, and prints the missing ones
        onnxruntime.preload_dlls()
    provider = PROVIDERS["cuda"], {"enable_cuda_graph": "1"} if graphs else {}
    return _session(path, _options(threads), mapped, providers=[provider])


def _settings() -> dict[str, str]:
    return SETTINGS if "vnni" in processor() else {**SETTINGS, **UINT8_WEIGHTS}


def _options(threads: int, **settings: str) -> Any:
    from onnxruntime import GraphOptimizationLevel, SessionOptions

    options = SessionOptions()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_ALL
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised, and must not be printed too
    for name, value in {**_settings(), **settings}.items():
        options.add_session_config_entry(name, value)
    return options


def _cached_session(path: Path, threads: int, cache: CompiledModels, key: str, mapped: bool) -> Any:
    """The session of the optimised model in the cache, put there if it is missing; None if caching it is not worth it or impossible."""
    from onnxruntime import __version__

    size = sum(file.stat().st_size for file in model_files(path))
    if size < MIN_CACHED:
        return None
    name = compiled_name(path, key, "onnxruntime", __version__, json.dumps([_settings(), SAVE_SETTINGS]))
    session = _optimised_session(cache.find(name), threads)
    if session is None:
        cache.drop(name)
        options = _options(threads, **SAVE_SETTINGS)
        # The weights of products are stored twice, in the model's layout and in the processor's: half as much again.
        with cache.fill(name, size * 3 // 2) as folder:
            if folder is not None:
                options.optimized_model_filepath = str(folder / OPTIMISED)
                _session(path, options, mapped, providers=[PROVIDERS["cpu"]])
        session = _optimised_session(cache.find(name), threads)
    return session


def _optimised_session(folder: Path | None, threads: int) -> Any:
    from onnxruntime import GraphOptimizationLevel

    if folder is None:
        return None
    options = _options(threads)
    options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL
    with suppress(EngineError), engine_errors("the cached model is damaged"):
        return _open_session(folder / OPTIMISED, options, providers=[PROVIDERS["cpu"]])


def _spec(node: Any) -> TensorSpec:
    if node.type not in DTYPES:
        raise EngineError(f"{node.name!r} has type {node.type}, which no engine of snoopi-rt takes")
    return TensorSpec(node.name, tuple(size if isinstance(size, int) else None for size in node.shape), DTYPES[node.type])
