"""Engines by name: what each needs, which are installed, and how one is loaded."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from snoopi_rt.engines.base import Engine, EngineError, EngineMissing, InputError


class Kind(NamedTuple):
    """Where an engine's class is ("module:Class", None = not in this version), the package that it imports, and that package's name.

    The extra of setup.py that installs the package has the engine's own name.
    """

    target: str | None
    package: str
    label: str


ENGINES = {
    "cpu": Kind("snoopi_rt.engines.ort:OrtEngine", "onnxruntime", "ONNX Runtime"),
    "openvino": Kind("snoopi_rt.engines.ov:OvEngine", "openvino", "OpenVINO"),
    "cuda": Kind("snoopi_rt.engines.ort:OrtEngine", "onnxruntime", "ONNX Runtime for CUDA"),
    "tensorrt": Kind(None, "tensorrt", "TensorRT"),
}


def check_engine(name: str) -> None:
    """Return when the engine can be loaded here, else raise InputError (unknown), EngineError (not yet) or EngineMissing."""
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}, choose from {', '.join(ENGINES)}")
    kind = ENGINES[name]
    if kind.target is None:
        raise EngineError(f"engine {name!r} is not supported by this version of snoopi-rt yet, choose from {', '.join(_supported())}")
    if find_spec(kind.package) is None:
        raise EngineMissing(f'engine {name!r} needs {kind.label}: pip install "snoopi-rt[{name}]"')


def installed() -> tuple[str, ...]:
    """Return the names of the engines whose package is there, in the order of ENGINES (`cuda` may still find no GPU)."""
    return tuple(name for name in _supported() if find_spec(ENGINES[name].package) is not None)


def load_engine(name: str, path: Path, precision: str | None = None, threads: int | None = None, cache: Path | None = None) -> Engine:
    """Return the model file as a callable Engine.

    `precision` is the build's ("fp32", "bf16" ...), `threads` the number of CPU threads, `cache` a folder for what is compiled.
    Raises what `check_engine` raises, and EngineError where the file cannot be loaded.
    """
    check_engine(name)
    target = ENGINES[name].target
    assert target is not None
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)(path, name, precision, threads, cache)


def _supported() -> tuple[str, ...]:
    return tuple(name for name, kind in ENGINES.items() if kind.target is not None)
