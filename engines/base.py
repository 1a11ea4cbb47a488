"""The protocol of engines: named arrays in, named arrays out. Knows no prompt, latent or seed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from snoopi_rt.engines.messages import why
from snoopi_rt.engines.native import native_code
from snoopi_rt.errors import EngineError, SnoopiError

if TYPE_CHECKING:
    import numpy as np

    from snoopi_rt.engines.compiled_cache import CompiledModels


@dataclass(frozen=True)
class TensorSpec:
    """One input or output."""

    name: str
    shape: tuple[int | None, ...]
    """None: any size. A first axis of any size is the batch, which all inputs of a model share."""
    dtype: str
    """numpy's name for it."""

    def fits(self, array: Any) -> bool:
        """Whether the array has this dtype and a shape that is allowed."""
        return str(array.dtype) == self.dtype and self.has_shape(array.shape)

    def has_shape(self, shape: Sequence[int | None]) -> bool:
        """Whether the shape is allowed."""
        return len(shape) == len(self.shape) and all(size in (None, other) for size, other in zip(self.shape, shape, strict=True))


class Axis(NamedTuple):
    """The sizes that a dynamic axis can have, as in TensorRT's profiles: `opt` is the one to optimise for."""

    min: int
    opt: int
    max: int


Progress = Callable[[str, float], None]
"""progress(task, share of it that is done, 0 to 1)"""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine opens a model."""

    name: str
    """The engine's name."""
    precision: str | None
    """The variant's precision."""
    threads: int
    cache: "CompiledModels | None" = None
    """Where compiled models are kept."""
    key: str = ""
    """The variant's hash, by which a compiled model is found again."""
    axes: Mapping[str, Axis] = field(default_factory=dict)
    """The dynamic axes by name, for engines that compile for ranges of sizes."""
    progress: Progress = lambda task, share: None
    mapped: bool = True
    """Whether weights may stay in the model's files, mapped into memory. Otherwise they are read, and the files are no longer needed:
    overwriting a mapped file kills the process (SIGBUS)."""


class Engine(Protocol):
    """One loaded model. Many threads may call it; the arrays that it returns are fresh and belong to the caller.

    They are numpy's, or the engine's own on its device: `np.asarray` copies those, and engines of the same kind take them as they are.
    """

    provider: str
    """What the model really runs on, as the engine's package calls it."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __call__(self, **arrays: "np.ndarray") -> "dict[str, np.ndarray]":
        """The outputs by name. Raises EngineError if the inputs do not fit `inputs` or the model fails."""

    def close(self) -> None:
        """Frees the model; a later call raises EngineError."""


def check_inputs(specs: Sequence[TensorSpec], arrays: Mapping[str, Any]) -> None:
    """Returns if the arrays are exactly the inputs, of the right dtypes and shapes and of one batch size, else raises EngineError."""
    names = [spec.name for spec in specs]
    if unknown := arrays.keys() - set(names):
        raise EngineError(f"unknown input {min(unknown)!r}, the model takes {', '.join(names)}")
    for spec in specs:
        if spec.name not in arrays:
            raise EngineError(f"input {spec.name!r} is missing, the model takes {', '.join(names)}")
        array = arrays[spec.name]
        if str(array.dtype) != spec.dtype:
            raise EngineError(f"input {spec.name!r} must be {spec.dtype}, got {array.dtype}")
        if not spec.has_shape(array.shape):
            shape = ", ".join("any" if size is None else str(size) for size in spec.shape)
            raise EngineError(f"input {spec.name!r} must have shape ({shape}), got {tuple(array.shape)}")
    # OpenVINO would take inputs of different batches in silence.
    batches = {spec.name: arrays[spec.name].shape[0] for spec in specs if spec.shape[:1] == (None,)}
    if len(set(batches.values())) > 1:
        raise EngineError(f"all inputs must have one batch, got {', '.join(f'{name} {size}' for name, size in batches.items())}")


@contextmanager
def engine_errors(doing: str) -> Iterator[None]:
    """Turns every exception of a foreign package into an EngineError of one line: the only place where that happens.

    The end of the process waits for such blocks, see native.py.
    """
    try:
        with native_code():
            yield
    except SnoopiError:
        raise
    except Exception as error:
        raise EngineError(f"{doing}: {why(error)}") from error
