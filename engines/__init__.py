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


class EngineInfo(NamedTuple):
    """What is known of an engine without importing it. The extra of setup.py that installs its first package has the engine's name."""

    target: str
    """Its class, "module:Class"."""
    packages: tuple[str, ...]
    """The packages, one of which it imports."""
    label: str
    """The first package's name for people."""
    distribution: str | None = None
    """What must be installed, if several distributions provide the package."""
    prefers_fixed_shapes: bool = False
    """Whether it is fastest for shapes that it has seen before."""
    takes: str | None = None
    """The engine whose variants it runs if a bundle has none for it."""

    @property
    def package(self) -> str:
        """The first package that is installed, else the first."""
        return next((name for name in self.packages if find_spec(name) is not None), self.packages[0])


ENGINES = {
    "cpu": EngineInfo("snoopi_rt.engines.ort:OrtEngine", ("onnxruntime",), "ONNX Runtime"),
    "openvino": EngineInfo("snoopi_rt.engines.openvino:OvEngine", ("openvino",), "OpenVINO"),
    "cuda": EngineInfo(
        "snoopi_rt.engines.ort:OrtEngine", ("onnxruntime",), "ONNX Runtime for CUDA", "onnxruntime-gpu", prefers_fixed_shapes=True
    ),
    "tensorrt": EngineInfo("snoopi_rt.engines.tensorrt:TrtEngine", ("tensorrt", "tensorrt_rtx"), "TensorRT", prefers_fixed_shapes=True),
}


def known_engine(name: str) -> EngineInfo:
    """The engine of that name. Raises InputError, naming the known ones."""
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}, choose from {', '.join(ENGINES)}")
    return ENGINES[name]


def variant_names(name: str) -> tuple[str, ...]:
    """The engines whose variants the engine runs: its own, else those that it takes."""
    takes = ENGINES[name].takes if name in ENGINES else None
    return (name,) if takes is None else (name, takes)


def check_engine(name: str) -> None:
    """Returns if the engine's package is installed. Raises InputError for an unknown engine, else EngineMissing."""
    info = known_engine(name)
    spec = find_spec(info.package)
    if spec is None:
        raise EngineMissing(f"engine {name!r} needs {info.label}: {how_to_install(name)}")
    if spec.origin is None:
        remark = f"{info.label} is half uninstalled{conflict(info.package)}"
        raise EngineMissing(f"engine {name!r}: {remark}: uninstall what is left, then {how_to_install(name)}")


def installed() -> tuple[str, ...]:
    """The names of the engines whose package is installed, in the order of ENGINES (`cuda` and `tensorrt` may still find no GPU)."""
    return tuple(name for name, info in ENGINES.items() if _is_installed(info))


def conflict(package: str = "onnxruntime") -> str:
    """A remark for errors if both packages are installed that overwrite each other's files, else an empty string."""
    if package != "onnxruntime" or not all(map(_has_distribution, ("onnxruntime", "onnxruntime-gpu"))):
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

    precision: the variant's ("fp32", "bf16" ...). threads: of the CPU; None: see `available_threads`. cache: keeps the compiled model for
    as long as the file's path, size and time and `key` (the variant's hash) stay the same. axes: the sizes of dynamic axes, by name, which
    `tensorrt` needs; it reports its builds to `progress`. mapped: whether weights may stay in the files; otherwise they are read into
    memory, and the files are no longer needed.
    Raises what `check_engine` raises, and EngineError if the file cannot be loaded.
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

    versions = {}
    for name in installed():
        package = ENGINES[name].package
        versions[name] = "unknown"  # such as onnxruntime out of onnxruntime-gpu
        for distribution in (ENGINES[name].distribution or package, f"{package}_cu13", f"{package}_cu12"):
            with suppress(PackageNotFoundError):
                versions[name] = version(distribution)
                break
    return versions


def _is_installed(info: EngineInfo) -> bool:
    """Whether the package can be imported from the right distribution; an empty folder that an uninstall left does not count."""
    spec = find_spec(info.package)
    return spec is not None and spec.origin is not None and (info.distribution is None or _has_distribution(info.distribution))


def _has_distribution(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
