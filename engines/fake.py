"""A fake engine: a numpy function in place of a model, for tests, ours and those of applications."""

from collections.abc import Callable, Sequence

import numpy as np

from snoopi_rt.engines.base import TensorSpec, check_inputs, engine_errors
from snoopi_rt.errors import EngineError


class FakeEngine:
    """A function from keyword arrays to a dict of arrays as an Engine; `calls` counts its calls."""

    provider = "fake"

    def __init__(self, function: Callable[..., dict[str, np.ndarray]], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.calls = 0
        self._function: Callable[..., dict[str, np.ndarray]] | None = function

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        if self._function is None:
            raise EngineError("this engine is closed")
        check_inputs(self.inputs, arrays)
        self.calls += 1
        with engine_errors(f"engine {self.provider} failed"):
            return self._function(**arrays)

    def close(self) -> None:
        self._function = None
