"""TensorRT and TensorRT for RTX: an ONNX file to a plan, and cached plans. TensorRT for RTX needs no GPU to build one.

Both have the same Python API; TensorRT for RTX and TensorRT 11 are always strongly typed, TensorRT 10 is asked to be. A plan is code for a
GPU: it is built on the machine that runs it, and one whose digest does not match is built again.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from snoopi_rt.engines.base import Axis, EngineOptions, Progress, engine_errors
from snoopi_rt.engines.compiled_cache import CompiledModels, compiled_name
from snoopi_rt.engines.messages import first_reason
from snoopi_rt.errors import EngineError

PLAN, DIGEST = "plan", "plan.sha256"
Profile = Mapping[str, Axis]
"""The sizes of each dynamic axis, by its name."""


def import_tensorrt(package: str) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`. Raises EngineError if it cannot be loaded."""
    with engine_errors("engine 'tensorrt' cannot use TensorRT"):
        return import_module(package)


def is_rtx(trt: Any) -> bool:
    """Whether the module is TensorRT for RTX, which compiles kernels on the GPU that runs them."""
    return hasattr(trt, "RuntimeCache") or hasattr(trt, "IRuntimeCache")


def profiles(axes: Mapping[str, Axis]) -> list[Profile]:
    """A profile for one image, so that the kernels fastest for one are chosen; and if batches are larger, one for several."""
    batch = axes.get("batch", Axis(1, 1, 1))
    one = {**axes, "batch": Axis(1, 1, 1)}
    return [one] if batch.max == 1 else [one, {**axes, "batch": Axis(2, batch.max, batch.max)}]


class CachedPlan:
    """The plan of the model in `path`: from the cache if it is there, undamaged and of this version, else built.

    gpu: describes the GPU and its driver. streaming: weights may stay on the host.
    """

    cached = False
    """Whether `read` took it from the cache."""

    def __init__(self, trt: Any, path: Path, options: EngineOptions, gpu: str, streaming: bool = False) -> None:
        self.trt, self.path, self.options, self.streaming = trt, path, options, streaming
        self.profiles = profiles(options.axes)
        made_by = (trt.__name__, trt.__version__, gpu)
        self.name = compiled_name(path, options.key, *made_by, json.dumps([self.profiles, streaming]))
        self._timings = hashlib.sha256(json.dumps(["timings", *made_by]).encode()).hexdigest()

    def read(self) -> bytes:
        """The plan, which concurrent readers build once. Raises EngineError if it cannot be built."""
        cache = self.options.cache
        if cache is None:
            return self._build(None)
        with cache.alone(self.name):
            plan = _read(cache, self.name)
            self.cached = plan is not None
            if plan is None:
                plan = self._build(None if is_rtx(self.trt) else CachedBytes(cache, self._timings))
                with cache.fill(self.name, len(plan)) as folder:
                    if folder is not None:
                        (folder / PLAN).write_bytes(plan)
                        (folder / DIGEST).write_bytes(hashlib.sha256(plan).digest())
        return plan

    def drop(self) -> None:
        """Removes a plan that does not work from the cache."""
        if self.options.cache is not None:
            self.options.cache.drop(self.name)

    def _build(self, timing: "CachedBytes | None") -> bytes:
        return build_plan(self.trt, self.path, self.profiles, self.options.progress, self.streaming, timing)


class CachedBytes:
    """Bytes in the cache that grow: TensorRT's timing cache, or kernels that were compiled on the GPU."""

    def __init__(self, cache: CompiledModels, name: str) -> None:
        self._cache, self._name = cache, name

    def read(self) -> bytes:
        """What was written last, or b""."""
        folder = self._cache.find(self._name)
        try:
            return b"" if folder is None else (folder / "kept").read_bytes()
        except OSError:
            return b""

    def write(self, data: bytes) -> None:
        """Replaces what was written before."""
        if data and data != self.read():
            self._cache.drop(self._name)
            with self._cache.fill(self._name, len(data)) as folder:
                if folder is not None:
                    (folder / "kept").write_bytes(data)


def build_plan(
    trt: Any, path: Path, profiles: list[Profile], progress: Progress, streaming: bool = False, timing: CachedBytes | None = None
) -> bytes:
    """The plan of an ONNX file with these profiles. Raises EngineError if TensorRT cannot read the file or build it."""
    log, errors = logger(trt)
    doing = f"engine 'tensorrt' cannot build {path.name}"
    with engine_errors(doing):
        builder = trt.Builder(log)
        strongly = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if strongly is None else 1 << int(strongly))
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(path)):
            raise EngineError(f"{doing}: {logged_reason([parser.get_error(i).desc() for i in range(parser.num_errors)] + errors)}")
        for layer in (network.get_layer(i) for i in range(network.num_layers)):
            if layer.type == getattr(trt.LayerType, "ATTENTION_INPUT", None):
                # Otherwise the build fails if no kernel fuses the attention. Layers come as their base class.
                layer.__class__ = trt.IAttentionInputLayer
                layer.attention.decomposable = True
        config = builder.create_builder_config()
        for profile in profiles:
            config.add_optimization_profile(_profile(builder, network, profile))
        if streaming:
            config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        if timing is not None:
            timings = config.create_timing_cache(timing.read())
            if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):  # of another GPU, or damaged
                config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        monitor = _monitor(trt, progress, f"building {path.stem}")
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError(f"{doing}: {logged_reason(errors)}")
        if timing is not None:
            with suppress(Exception):  # the plan, which took minutes, is worth returning without them
                timing.write(bytes(config.get_timing_cache().serialize()))
        progress(f"building {path.stem}", 1.0)
        return bytes(plan)


def _read(cache: CompiledModels, name: str) -> bytes | None:
    """The cached plan of that name; None if it is missing or damaged, in which case it is removed."""
    folder = cache.find(name)
    if folder is None:
        return None
    try:
        plan, digest = (folder / PLAN).read_bytes(), (folder / DIGEST).read_bytes()
    except OSError:
        plan, digest = b"", b""
    if hashlib.sha256(plan).digest() == digest:
        return plan
    cache.drop(name)
    return None


def _profile(builder: Any, network: Any, sizes: Profile) -> Any:
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        axes = []
        for place, size in enumerate(tensor.shape):
            axis = tensor.get_dimension_name(place)
            if size < 0 and axis not in sizes:
                raise EngineError(f"engine 'tensorrt' must know the sizes of axis {axis or place!r} of input {tensor.name!r}")
            axes.append(sizes[axis] if size < 0 else Axis(size, size, size))
        profile.set_shape(tensor.name, *([axis[kind] for axis in axes] for kind in range(3)))
    return profile


def logger(trt: Any) -> tuple[Any, list[str]]:
    """A silent logger, and the list of the errors that it gets."""
    errors: list[str] = []

    class Logger(trt.ILogger):
        """Collects errors, which are raised in one line, and drops the rest."""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                errors.append(message)

    return Logger(), errors


def _monitor(trt: Any, progress: Progress, task: str) -> Any:
    class Monitor(trt.IProgressMonitor):
        """TensorRT's nested phases as one share of the whole."""

        def __init__(self) -> None:
            super().__init__()
            # phase -> [parent phase, number of steps, steps done]
            self.phases: dict[str, list] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = [parent, max(steps, 1), 0]

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.phases:
                self.phases[name][2] = step + 1
                progress(task, self.share(name))
            return True

        def phase_finish(self, name: str) -> None:
            self.phases.pop(name, None)

        def share(self, name: str | None) -> float:
            inner = 0.0
            while name in self.phases:
                name, steps, done = self.phases[name]
                inner = min(1.0, (done + inner) / steps)
            return inner

    return Monitor()


def logged_reason(errors: list[str]) -> str:
    """Why TensorRT failed, by its log."""
    return first_reason(errors) or "TensorRT does not say why"
