"""ONNX Runtime sessions whose inputs and outputs stay on the GPU between calls, so that equal shapes are one CUDA graph."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np

from snoopi_rt.engines.base import TensorSpec

LANES = 16
"""Combinations of input shapes that are kept ready; what was not used for longest goes first, its CUDA graph stays with the session."""
NO_GRAPH = "-1"
_THREAD = ThreadPoolExecutor(1, "snoopi_rt CUDA")
"""The one thread that every session is opened, run and closed on. While ONNX Runtime records a graph no other thread may touch the GPU, and
it keeps the graphs of each thread apart."""


class BoundSession:
    """A session's calls through bound memory. `device` is ONNX Runtime's word ("cuda"; "cpu" shows the way without a GPU).

    open(graphs): a session that can record CUDA graphs or need not. The first call of a combination of shapes finds out those of the
    outputs, the second records a graph; where something cannot be recorded, the session is opened again and goes on without.
    """

    def __init__(self, open: Callable[[bool], Any], device: str) -> None:
        self._open, self._device = open, device
        self._lanes: dict[tuple, _Lane] = {}
        self._made, self._graphs = 0, True
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
        lane = self._lane(arrays)
        try:
            return lane.run(arrays, outputs, self._graphs)
        except Exception:  # ONNX Runtime has no class for what cannot be recorded
            if not (self._graphs and lane.bound):
                raise
        # The session is of no use any more: its stream is still half way through a recording. Nothing may hold it when the next one opens.
        del lane
        self._forget()
        self._graphs, self.session = False, self._open(False)
        return self._lane(arrays).run(arrays, outputs, False)

    def _lane(self, arrays: Mapping[str, np.ndarray]) -> "_Lane":
        shapes = tuple((name, array.shape) for name, array in sorted(arrays.items()))
        lane = self._lanes.pop(shapes, None)
        if lane is None:
            lane = _Lane(self.session, self._device, arrays, self._made)
            self._made += 1
        self._lanes[shapes] = lane
        if len(self._lanes) > LANES:
            del self._lanes[next(iter(self._lanes))]
        return lane

    def _forget(self) -> None:
        self._lanes.clear()
        self.session = None


class _Lane:
    """The bound memory of one combination of input shapes."""

    def __init__(self, session: Any, device: str, arrays: Mapping[str, np.ndarray], number: int) -> None:
        from onnxruntime import OrtValue

        self._session, self._device, self._number = session, device, number
        self._binding = session.io_binding()
        self._inputs = {
            name: OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype.type, device, 0) for name, array in arrays.items()
        }
        self.bound: dict[str, Any] = {}

    def run(self, arrays: Mapping[str, np.ndarray], outputs: Sequence[TensorSpec], graphs: bool) -> dict[str, np.ndarray]:
        from onnxruntime import RunOptions

        for name, value in self._inputs.items():
            value.update_inplace(np.ascontiguousarray(arrays[name]))
            # Each time, for its values: one that the CPU reads is copied there now. The address stays, so graphs do too.
            self._binding.bind_ortvalue_input(name, value)
        options = RunOptions()
        # Memory that ONNX Runtime chose itself is another in each call, and no part of a graph.
        options.add_run_config_entry("gpu_graph_id", str(self._number) if graphs and self.bound else NO_GRAPH)
        if not self.bound:
            for spec in outputs:
                self._binding.bind_output(spec.name, self._device)
        self._session.run_with_iobinding(self._binding, options)
        found = dict(zip((spec.name for spec in outputs), self._binding.get_outputs(), strict=True))
        if not self.bound:
            self.bound = found
            for name, value in found.items():
                self._binding.bind_ortvalue_output(name, value)
        # On the CPU numpy() shows the memory itself.
        return {name: value.numpy().copy() if self._device == "cpu" else value.numpy() for name, value in found.items()}
