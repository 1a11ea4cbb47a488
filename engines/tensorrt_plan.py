"""TensorRT and TensorRT for RTX: an ONNX file to a plan, and the plans that are kept. Needs no GPU for the latter.

Both have one Python API; TensorRT for RTX and TensorRT 11 are always strongly typed, TensorRT 10 is asked to be. A plan is code for a GPU:
it is made here and nowhere else, and one whose digest is not what was written is made anew.
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
from snoopi_rt.engines.messages import reason
from snoopi_rt.errors import EngineError

PLAN, DIGEST = "plan", "plan.sha256"
Profile = Mapping[str, Axis]
"""The sizes of each free axis, by its name."""


def library(package: str) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`. Raises EngineError where it cannot be loaded."""
    with engine_errors("engine 'tensorrt' cannot use TensorRT"):
        return import_module(package)


def is_rtx(trt: Any) -> bool:
    """Whether it is TensorRT for RTX, which compiles kernels on the GPU that runs them."""
    return hasattr(trt, "RuntimeCache") or hasattr(trt, "IRuntimeCache")


def profiles(axes: Mapping[str, Axis]) -> list[Profile]:
    """One image at once, for which kernels are chosen that are fastest for one, and where there may be more, several."""
    batch = axes.get("batch", Axis(1, 1, 1))
    one = {**axes, "batch": Axis(1, 1, 1)}
    return [one] if batch.max == 1 else [one, {**axes, "batch": Axis(2, batch.max, batch.max)}]


class KeptPlan:
    """The plan of the model in `path` for a GPU: from the cache if it is there, whole and of this version, else built.

    gpu: all that is known of it and its driver. streaming: weights may stay on the host. kept: whether it came from the cache.
    """

    kept = False

    def __init__(self, trt: Any, path: Path, options: EngineOptions, gpu: str, streaming: bool = False) -> None:
        self.trt, self.path, self.options, self.streaming = trt, path, options, streaming
        self.wanted = profiles(options.axes)
        made_by = (trt.__name__, trt.__version__, gpu)
        self.name = compiled_name(path, options.key, *made_by, json.dumps([self.wanted, streaming]))
        self._timings = hashlib.sha256(json.dumps(["timings", *made_by]).encode()).hexdigest()

    def read(self) -> bytes:
        """The plan. Two who want one plan build it once. Raises EngineError where it cannot be built."""
        cache = self.options.cache
        if cache is None:
            return self._build(None)
        with cache.alone(self.name):
            plan = _read(cache, self.name)
            self.kept = plan is not None
            if plan is None:
                plan = self._build(None if is_rtx(self.trt) else Kept(cache, self._timings))
                with cache.fill(self.name, len(plan)) as folder:
                    if folder is not None:
                        (folder / PLAN).write_bytes(plan)
                        (folder / DIGEST).write_bytes(hashlib.sha256(plan).digest())
        return plan

    def drop(self) -> None:
        """Forgets a plan that does not work."""
        if self.options.cache is not None:
            self.options.cache.drop(self.name)

    def _build(self, timing: "Kept | None") -> bytes:
        return build_plan(self.trt, self.path, self.wanted, self.options.progress, self.streaming, timing)


class Kept:
    """Bytes in the cache that grow: timings of kernels, or kernels that were compiled on the GPU."""

    def __init__(self, cache: CompiledModels, name: str) -> None:
        self._cache, self._name = cache, name

    def read(self) -> bytes:
        """What was written, b"" if nothing was."""
        folder = self._cache.find(self._name)
        try:
            return b"" if folder is None else (folder / "kept").read_bytes()
        except OSError:
            return b""

    def write(self, data: bytes) -> None:
        """Keeps them in the place of what was kept before."""
        if data and data != self.read():
            self._cache.drop(self._name)
            with self._cache.fill(self._name, len(data)) as folder:
                if folder is not None:
                    (folder / "kept").write_bytes(data)


def build_plan(
    trt: Any, path: Path, wanted: list[Profile], progress: Progress, streaming: bool = False, timing: Kept | None = None
) -> bytes:
    """The plan of an ONNX file, for each profile. Raises EngineError where TensorRT cannot read the file or build it."""
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
                # Else a build fails where no kernel has both steps of an attention in one. Layers come as their base class.
                layer.__class__ = trt.IAttentionInputLayer
                layer.attention.decomposable = True
        config = builder.create_builder_config()
        for profile in wanted:
            config.add_optimization_profile(_profile(builder, network, profile))
        if streaming:
            config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        if timing is not None:
            known = config.create_timing_cache(timing.read())
            if known is None or not config.set_timing_cache(known, ignore_mismatch=False):  # of another GPU, or damaged
                config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        monitor = _monitor(trt, progress, f"building {path.stem}")
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError(f"{doing}: {logged_reason(errors)}")
        if timing is not None:
            with suppress(Exception):  # the plan is what minutes were spent for
                timing.write(bytes(config.get_timing_cache().serialize()))
        progress(f"building {path.stem}", 1.0)
        return bytes(plan)


def _read(cache: CompiledModels, name: str) -> bytes | None:
    """The plan that is kept under the name; None where there is none or it is not what was written, which is then forgotten."""
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
        given = network.get_input(i)
        axes = []
        for place, size in enumerate(given.shape):
            axis = given.get_dimension_name(place)
            if size < 0 and axis not in sizes:
                raise EngineError(f"engine 'tensorrt' must know the sizes of axis {axis or place!r} of input {given.name!r}")
            axes.append(sizes[axis] if size < 0 else Axis(size, size, size))
        profile.set_shape(given.name, *([axis[kind] for axis in axes] for kind in range(3)))
    return profile


def logger(trt: Any) -> tuple[Any, list[str]]:
    """A logger that is silent, and the list of the errors that it was told."""
    errors: list[str] = []

    class Logger(trt.ILogger):
        """Keeps errors, which are raised in one line, and drops the rest."""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                errors.append(message)

    return Logger(), errors


def _monitor(trt: Any, progress: Progress, what: str) -> Any:
    class Monitor(trt.IProgressMonitor):
        """TensorRT's phases, which lie in each other, as one share of the whole."""

        def __init__(self) -> None:
            super().__init__()
            # phase -> [the phase that it is a step of, its steps, those that are done]
            self.phases: dict[str, list] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = [parent, max(steps, 1), 0]

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.phases:
                self.phases[name][2] = step + 1
                progress(what, self.share(name))
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
    """Why TensorRT failed, of what it logged."""
    return reason(errors) or "TensorRT does not say why"
