"""ONNX Runtime sessions whose inputs and outputs stay on the GPU between calls, so that equal shapes are one CUDA graph."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from snoopi_rt.engines.base import TensorSpec

LANES = 16
"""Combinations of input shapes that are kept ready; what was not used for longest goes first, its CUDA graph stays with the session."""
NO_GRAPH = "-1"


class BoundSession:
    """A session's calls through bound memory. `device` is ONNX Runtime's word ("cuda"; "cpu" shows the way without a GPU).

    The first call of a combination of shapes finds out those of the outputs; with `graphs`, the second records a CUDA graph.
    """

    def __init__(self, session: Any, device: str, outputs: Sequence[TensorSpec], graphs: bool) -> None:
        self._session, self._device, self._outputs, self._graphs = session, device, outputs, graphs
        self._lanes: dict[tuple, _Lane] = {}
        self._made = 0
        self._lock = threading.Lock()

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs, copied from the device."""
        shapes = tuple((name, array.shape) for name, array in sorted(arrays.items()))
        with self._lock:  # the memory of a lane is that of one call
            lane = self._lanes.pop(shapes, None)
            if lane is None:
                lane = _Lane(self._session, self._device, arrays, self._made)
                self._made += 1
            self._lanes[shapes] = lane
            if len(self._lanes) > LANES:
                del self._lanes[next(iter(self._lanes))]
            return lane.run(arrays, self._outputs, self._graphs)


class _Lane:
    """The bound memory of one combination of input shapes."""

    def __init__(self, session: Any, device: str, arrays: Mapping[str, np.ndarray], number: int) -> None:
        from onnxruntime import OrtValue

        self._session, self._device, self._number = session, device, number
        self._binding = session.io_binding()
        self._inputs = {
            name: OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype.type, device, 0) for name, array in arrays.items()
        }
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        self._bound: dict[str, Any] = {}

    def run(self, arrays: Mapping[str, np.ndarray], outputs: Sequence[TensorSpec], graphs: bool) -> dict[str, np.ndarray]:
        from onnxruntime import RunOptions

        for name, value in self._inputs.items():
            value.update_inplace(np.ascontiguousarray(arrays[name]))
        options = RunOptions()
        # Memory that ONNX Runtime chose itself is another in each call, and no part of a graph.
        options.add_run_config_entry("gpu_graph_id", str(self._number) if graphs and self._bound else NO_GRAPH)
        if not self._bound:
            for spec in outputs:
                self._binding.bind_output(spec.name, self._device)
        self._session.run_with_iobinding(self._binding, options)
        found = dict(zip((spec.name for spec in outputs), self._binding.get_outputs(), strict=True))
        if not self._bound:
            self._bound = found
            for name, value in found.items():
                self._binding.bind_ortvalue_output(name, value)
        # On the CPU numpy() shows the memory itself.
        return {name: value.numpy().copy() if self._device == "cpu" else value.numpy() for name, value in found.items()}
