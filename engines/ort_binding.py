"""ONNX Runtime sessions whose inputs and outputs stay on the GPU between calls, so that equal shapes are one CUDA graph."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np

from snoopi_rt.engines.base import TensorSpec

MAX_BINDINGS = 16
"""Combinations of input shapes that stay bound; the least recently used is dropped, but its CUDA graph stays with the session."""
NO_GRAPH = "-1"
_THREAD = ThreadPoolExecutor(1, "snoopi_rt CUDA")
"""The only thread on which sessions are opened, run and closed. While ONNX Runtime captures a graph no other thread may touch the GPU, and
every thread has its own graphs."""


class BoundSession:
    """A session called through bound memory. `device` is ONNX Runtime's name for it ("cuda"; "cpu" does the same without a GPU).

    open(graphs): a session with or without CUDA graphs. The first call with a combination of shapes determines those of the outputs, the
    second captures a graph; if something cannot be captured, the session is opened again without graphs.
    """

    def __init__(self, open: Callable[[bool], Any], device: str) -> None:
        self._open, self._device = open, device
        self._bindings: dict[tuple, _Binding] = {}
        self._count, self._graphs = 0, True
        self.session: Any = _THREAD.submit(self._opened).result()

    def __call__(self, arrays: Mapping[str, np.ndarray], outputs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
        """The outputs, copied from the device."""
        return _THREAD.submit(self._run, arrays, outputs).result()

    def close(self) -> None:
        """Frees everything."""
        _THREAD.submit(self._forget).result()

    def _opened(self) -> Any:
        with suppress(Exception):  # an operator that runs on the CPU
            return self._open(True)
        self._graphs = False
        return self._open(False)

    def _run(self, arrays: Mapping[str, np.ndarray], outputs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
        binding = self._binding(arrays)
        try:
            return binding.run(arrays, outputs, self._graphs)
        except Exception:  # ONNX Runtime has no class for what cannot be captured
            if not (self._graphs and binding.bound):
                raise
        # The session cannot be used any more: its stream is still capturing. Nothing may hold it when the next one opens.
        del binding
        self._forget()
        self._graphs, self.session = False, self._open(False)
        return self._binding(arrays).run(arrays, outputs, False)

    def _binding(self, arrays: Mapping[str, np.ndarray]) -> "_Binding":
        shapes = tuple((name, array.shape) for name, array in sorted(arrays.items()))
        binding = self._bindings.pop(shapes, None)
        if binding is None:
            binding = _Binding(self.session, self._device, arrays, self._count)
            self._count += 1
        self._bindings[shapes] = binding
        if len(self._bindings) > MAX_BINDINGS:
            del self._bindings[next(iter(self._bindings))]
        return binding

    def _forget(self) -> None:
        self._bindings.clear()
        self.session = None


class _Binding:
    """The bound memory of one combination of input shapes."""

    def __init__(self, session: Any, device: str, arrays: Mapping[str, np.ndarray], number: int) -> None:
        from onnxruntime import OrtValue

        self._session, self._device, self._number = session, device, number
        self._io_binding = session.io_binding()
        self._inputs = {
            name: OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype.type, device, 0) for name, array in arrays.items()
        }
        self.bound: dict[str, Any] = {}

    def run(self, arrays: Mapping[str, np.ndarray], outputs: Sequence[TensorSpec], graphs: bool) -> dict[str, np.ndarray]:
        from onnxruntime import RunOptions

        for name, value in self._inputs.items():
            value.update_inplace(np.ascontiguousarray(arrays[name]))
            # Bound in each call for its values: an input that the CPU reads is copied now. Its address stays, so graphs stay valid.
            self._io_binding.bind_ortvalue_input(name, value)
        options = RunOptions()
        # Memory that ONNX Runtime allocates itself differs from call to call and cannot be part of a graph.
        options.add_run_config_entry("gpu_graph_id", str(self._number) if graphs and self.bound else NO_GRAPH)
        if not self.bound:
            for spec in outputs:
                self._io_binding.bind_output(spec.name, self._device)
        self._session.run_with_iobinding(self._io_binding, options)
        values = dict(zip((spec.name for spec in outputs), self._io_binding.get_outputs(), strict=True))
        if not self.bound:
            self.bound = values
            for name, value in values.items():
                self._io_binding.bind_ortvalue_output(name, value)
        # On the CPU numpy() shows the memory itself.
        return {name: value.numpy().copy() if self._device == "cpu" else value.numpy() for name, value in values.items()}
