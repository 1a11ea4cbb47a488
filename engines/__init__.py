"""Engines by name: what each needs, which are installed, and how one is loaded."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from snoopi_rt.engines.base import Axis, Engine, EngineOptions, Progress
from snoopi_rt.engines.compiled_cache import CompiledModels
from snoopi_rt.engines.threads import available_threads
from snoopi_rt.errors import EngineMissing, InputError, how_to_install


class Kind(NamedTuple):
    """Where an engine's class is ("module:Class"), the packages one of which it imports, and the first one's name.

    The extra of setup.py that installs the first package has the engine's own name. `distribution` is what must be installed where a
    package comes in several forms. `prefers_fixed_shapes`: it is fastest for shapes that it has seen before.
    """

    target: str
    packages: tuple[str, ...]
    label: str
    distribution: str | None = None
    prefers_fixed_shapes: bool = False

    @property
    def package(self) -> str:
        """The first package that is there, else the first."""
        return next((name for name in self.packages if find_spec(name) is not None), self.packages[0])


ENGINES = {
    "cpu": Kind("snoopi_rt.engines.ort:OrtEngine", ("onnxruntime",), "ONNX Runtime"),
    "openvino": Kind("snoopi_rt.engines.openvino:OvEngine", ("openvino",), "OpenVINO"),
    "cuda": Kind(
        "snoopi_rt.engines.ort:OrtEngine", ("onnxruntime",), "ONNX Runtime for CUDA", "onnxruntime-gpu", prefers_fixed_shapes=True
    ),
    "tensorrt": Kind("snoopi_rt.engines.tensorrt:TrtEngine", ("tensorrt", "tensorrt_rtx"), "TensorRT", prefers_fixed_shapes=True),
}


def known_engine(name: str) -> Kind:
    """What belongs to the name. Raises InputError for an unknown one."""
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}, choose from {', '.join(ENGINES)}")
    return ENGINES[name]


def check_engine(name: str) -> None:
    """Returns when the engine's package is there, else raises what `known_engine` raises, or EngineMissing."""
    kind = known_engine(name)
    spec = find_spec(kind.package)
    if spec is None:
        raise EngineMissing(f"engine {name!r} needs {kind.label}: {how_to_install(name)}")
    if spec.origin is None:
        remark = f"{kind.label} is half uninstalled{conflict(kind.package)}"
        raise EngineMissing(f"engine {name!r}: {remark}: uninstall what is left, then {how_to_install(name)}")


def installed() -> tuple[str, ...]:
    """The names of the engines whose package is there, in the order of ENGINES (`cuda` and `tensorrt` may still find no GPU)."""
    return tuple(name for name, kind in ENGINES.items() if _is_there(kind))


def conflict(package: str = "onnxruntime") -> str:
    """A remark where the two packages that overwrite each other's files are both installed, else nothing."""
    if package != "onnxruntime" or not all(map(_is_distributed, ("onnxruntime", "onnxruntime-gpu"))):
        return ""
    return " (onnxruntime and onnxruntime-gpu are both installed and overwrite each other: uninstall both, then install one)"


def load_engine(
    name: str,
    path: Path,
    precision: str | None = None,
    threads: int | None = None,
    cache: CompiledModels | None = None,
    key: str = "",
    axes: Mapping[str, Axis] | None = None,
    progress: Progress | None = None,
    mapped: bool = True,
) -> Engine:
    """The model file as a callable Engine.

    `precision` is the build's ("fp32", "bf16" ...), `threads` the number of CPU threads (None = see `available_threads`). `cache` keeps
    what is compiled, for as long as the file's path, size and time and `key` are the same: give the build's hash. `axes` are the sizes
    that free axes can have, by name, which `tensorrt` needs; it tells `progress` what it builds. Unless `mapped` weights are read into
    memory, and the files are needed no more.
    Raises what `check_engine` raises, and EngineError where the file cannot be loaded.
    """
    check_engine(name)
    options = EngineOptions(name, precision, available_threads() if threads is None else threads, cache, key, axes or {}, mapped=mapped)
    if progress is not None:
        options = replace(options, progress=progress)
    module, _, attribute = ENGINES[name].target.partition(":")
    return getattr(import_module(module), attribute)(path, options)


def versions() -> dict[str, str]:
    """The version of each installed engine's package."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in installed():
        package = ENGINES[name].package
        found[name] = "unknown"  # such as onnxruntime out of onnxruntime-gpu
        for distribution in (ENGINES[name].distribution or package, f"{package}_cu13", f"{package}_cu12"):
            with suppress(PackageNotFoundError):
                found[name] = version(distribution)
                break
    return found


def _is_there(kind: Kind) -> bool:
    """Whether the package can be imported and is of the right form; a folder without files, which an uninstall left, is none."""
    spec = find_spec(kind.package)
    return spec is not None and spec.origin is not None and (kind.distribution is None or _is_distributed(kind.distribution))


def _is_distributed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
