"""One graph to its variants: each precision written, measured on every engine that it is for, and kept if it is near enough to PyTorch."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from snoopi_rt.bundle.bundle import File, Parity, Variant
from snoopi_rt.bundle.manifest import digits_apart
from snoopi_rt.engines.openvino import NO_BF16
from snoopi_rt.errors import InputError, OutputError
from snoopi_rt.export.onnx_graphs.engine_rewrites import one_image_bf16, onnxruntime_operators
from snoopi_rt.export.onnx_graphs.mixed_precision import Half, half_arithmetic, rounded
from snoopi_rt.export.onnx_graphs.parity import Arrays, View, measure
from snoopi_rt.export.onnx_graphs.quantise import calibrate, layers, quantise
from snoopi_rt.export.onnx_graphs.weight_compression import Storage
from snoopi_rt.export.onnx_graphs.write import write_graph

Cases = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Precision:
    """How one precision is stored and on which engines it runs.

    Arithmetic is fp32, but on OpenVINO bf16 in bf16 and between the products of int8. `file`: the precision whose file of weights it reads.
    `bf16`: on OpenVINO it has a form for one image at a time (see forms.py).
    """

    engines: tuple[str, ...]
    weights: Storage = "fp16"
    file: str | None = None
    bf16: bool = False


PRECISIONS = {
    "fp32": Precision(("cpu", "openvino"), "fp32"),
    "fp16": Precision(("cpu", "openvino")),
    "bf16": Precision(("openvino",), file="fp16", bf16=True),
    "int8": Precision(("cpu", "openvino"), bf16=True),
    "int8-weights": Precision(("cpu", "openvino"), "int8"),
    "int4-weights": Precision(("cpu", "openvino"), "int4"),
}
AUTO = ("int8", "bf16")
"""The fast precisions, fastest first: `auto` takes the first that is near enough, and fp16 (else fp32) for every engine."""
NEAREST = {
    "int4-weights": ("int8-weights", "fp16", "fp32"),
    "int8": ("int8-weights", "fp16", "fp32"),
    "int8-weights": ("fp16", "fp32"),
    "bf16": ("fp16", "fp32"),
    "fp16": ("fp32",),
}
"""What stands in, first to last, for a precision that a graph cannot have; all of them run on both engines."""
GPU_ENGINES = ("tensorrt", "cuda")
HALVES: tuple[Half, ...] = ("fp16", "bf16")
"""Of these the GPU's engines get the first that is near enough; their arithmetic is that type's."""
LARGE_ENGINES = ("cpu",)
"""Those for a graph larger than the memory: OpenVINO holds packed weights two to three times (T5-XXL: 14.9 GB) and takes twice as long."""
INT8_CONVOLUTIONS = ("openvino",)
"""Those that have them between wider tensors; ONNX Runtime's give int8, which is rounded once more."""
SIMULATED = 0.7
"""The share of its tolerance that int8 may take while it is simulated in fp32: between the products activations are in bf16 later."""
KEPT = (0.0, 0.05, 0.15, 0.35)
"""Shares of the layers, worst first, that int8 leaves as they are where all of them would be too many."""


@dataclass(frozen=True)
class Graph:
    """What is known of a graph before it is written.

    example: inputs with a batch of 2. calibration, scored: cases of batch 1; wanted: PyTorch's outputs of `scored`, in fp32.
    error(i, outputs): what `tolerance` bounds for a build that is not fp32, of scored case i; with a `view` that is its error.
    alone: one image at a time, whatever the precision. tensor_of: see write_graph.
    """

    name: str
    module: nn.Module
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]
    example: Mapping[str, Tensor]
    calibration: Cases
    scored: Cases
    wanted: Sequence[Arrays]
    error: Callable[[int, Arrays], float]
    tolerance: float
    fp32_tolerance: float
    opset: int
    view: View | None = None
    alone: bool = False
    tensor_of: Callable[[str], Tensor] | None = None


def check_precision(name: str) -> None:
    """Returns for a precision that a graph can be exported in, else raises InputError."""
    if name not in ("auto", *PRECISIONS):
        raise InputError(f"unknown precision {name!r}, choose from auto, {', '.join(PRECISIONS)}")


def build(
    graph: Graph,
    precisions: Sequence[str],
    folder: Path,
    engines: Sequence[str],
    say: Callable[[str], None],
    or_nearest: Collection[str] = (),
) -> tuple[Variant, ...]:
    """The graph's variants in the order of `precisions`, their files in `folder`; `engines` are those on which parity is measured.

    Of a name in `or_nearest` the graph gets the nearest precision that it can have. Raises OutputError where another that was asked for by
    name is beyond its tolerance, InputError where the graph cannot have it at all.
    """
    made: dict[str, list[Variant]] = {}
    for precision in precisions:
        # Of each group the first that is near enough is taken.
        nearest = NEAREST.get(precision, ()) if precision in or_nearest else ()
        for group in _auto(graph) if precision == "auto" else ((precision, *nearest),):
            for name in group:
                served = PRECISIONS[name].engines if graph.tensor_of is None else LARGE_ENGINES
                usable = [engine for engine in served if engine in engines]
                if not usable and precision != "auto":
                    raise InputError(f"precision {name} of {graph.name} is for {', '.join(served)}, which is not installed")
                if name not in made and usable:
                    try:
                        made[name] = _build(graph, name, folder, usable, say)
                    except (InputError, OutputError) as error:
                        if name == "fp32" or len(group) == 1:
                            raise
                        say(f"{graph.name}: {name} is not taken: {error}")
                        continue
                    for each in made[name]:
                        say(f"{graph.name}: {each.described()}")
                if name in made:
                    break
    taken = [each for variants in made.values() for each in variants]
    if graph.tensor_of is None:
        taken += _gpu_builds(graph, precisions, folder, engines[0], say)
    _drop_unused(graph, taken, folder)
    return tuple(taken)


def _auto(graph: Graph) -> Sequence[Sequence[str]]:
    """A fast build if there is one and a wide one for every engine; of a graph larger than the memory one packed build."""
    return (AUTO, ("fp16", "fp32")) if graph.tensor_of is None else (("int8-weights", "fp16", "fp32"),)


def _build(graph: Graph, name: str, folder: Path, engines: Sequence[str], say: Callable[[str], None]) -> list[Variant]:
    """One build, or one for each engine that has a form of its own."""
    precision = PRECISIONS[name]
    written = folder / f"{graph.name}-{precision.file or name}.onnx"
    if name == "int8" and any(isinstance(layer, nn.Conv2d) for layer in layers(graph.module).values()):
        engines = [engine for engine in engines if engine in INT8_CONVOLUTIONS]
        if not engines:
            raise OutputError(f"graph {graph.name} has convolutions, which in int8 are for {', '.join(INT8_CONVOLUTIONS)}, not installed")
    module = _quantised(graph, say) if name == "int8" else graph.module
    _write(graph, module, written, precision.weights)
    served: dict[Path, list[str]] = {}
    for engine in engines:
        own = folder / f"{graph.name}-{name}-{engine}.onnx"
        changed = onnxruntime_operators(written, own) if engine == "cpu" else precision.bf16 and one_image_bf16(written, own)
        served.setdefault(own if changed else written, []).append(engine)
    return [_measured(graph, name, path, written, on, say) for path, on in served.items()]


def _gpu_builds(graph: Graph, precisions: Sequence[str], folder: Path, engine: str, say: Callable[[str], None]) -> list[Variant]:
    """Those with half arithmetic that are near enough: all that are asked for by name, of `auto` the first."""
    named, made = [half for half in HALVES if half in precisions], []
    for half in named or (HALVES if "auto" in precisions else ()):
        try:
            made.append(_gpu_build(graph, half, folder, engine))
        except (InputError, OutputError) as error:
            say(f"{graph.name}: {half} is not taken for {' and '.join(GPU_ENGINES)}: {error}")
            if isinstance(error, InputError):
                break
        else:
            say(f"{graph.name}: {made[-1].described()}")
            if not named:
                break
    return made


def _gpu_build(graph: Graph, half: Half, folder: Path, engine: str) -> Variant:
    """The build with half arithmetic for a GPU's engines, measured on `engine` with every operator's outcome rounded as a GPU rounds it."""
    written = folder / f"{graph.name}-{PRECISIONS['bf16'].file}.onnx"
    _write(graph, graph.module, written, PRECISIONS["fp16"].weights)
    path, simulated = folder / f"{graph.name}-{half}-gpu.onnx", folder / f"{graph.name}-rounded.onnx"
    half_arithmetic(written, path, half)
    rounded(path, simulated)
    try:
        found = measure(graph.name, simulated, "fp16", (engine,), _arrays_of(graph.scored), graph.wanted, graph.view)
    finally:
        simulated.unlink()
    _within(graph, half, found.parity, f"{engine} with its roundings")
    return Variant(GPU_ENGINES, half, "onnx", _files(path, written), found.inputs, found.outputs, found.parity, graph.tolerance)


def _write(graph: Graph, module: nn.Module, path: Path, weights: Storage) -> None:
    if not path.exists():
        write_graph(module, graph.example, graph.outputs, graph.dynamic, path, weights, graph.opset, graph.tensor_of)


def _measured(graph: Graph, name: str, path: Path, written: Path, engines: Sequence[str], say: Callable[[str], None]) -> Variant:
    """The build of the model in `path`, which is `written` or a form of it. Raises OutputError where it is beyond its tolerance."""
    found = measure(graph.name, path, name, engines, _arrays_of(graph.scored), graph.wanted, graph.view)
    parity, on = found.parity, ", ".join(engines)
    if any(NO_BF16 in provider for provider in found.providers):
        if name == "bf16":
            raise OutputError(f"graph {graph.name} in bf16 cannot be measured here{NO_BF16}")
        say(f"{graph.name}: {name} was measured with fp32 between its products{NO_BF16}: where there is, the error is larger")
    if name == "fp32" and not parity.relative_l2 <= graph.fp32_tolerance:
        digits = digits_apart(parity.relative_l2, graph.fp32_tolerance)
        far = f"{parity.relative_l2:.{digits}g} (relative L2) off PyTorch on {on}, allowed is {graph.fp32_tolerance:.{digits}g}"
        raise OutputError(f"graph {graph.name} in fp32 is {far}")
    _within(graph, name, parity, on)
    limit = 1 if graph.alone or (path != written and "openvino" in engines) else None
    return Variant(tuple(engines), name, "onnx", _files(path, written), found.inputs, found.outputs, parity, graph.tolerance, limit)


def _within(graph: Graph, name: str, parity: Parity, on: str) -> None:
    """Raises OutputError where a variant is beyond its tolerance."""
    if not parity.error <= graph.tolerance:
        digits = digits_apart(parity.error, graph.tolerance)
        off, allowed = parity.judged(digits), f"{graph.tolerance:.{digits}g}"
        raise OutputError(f"graph {graph.name} in {name} is {off} off PyTorch on {on}, allowed is {allowed}")


def _files(path: Path, written: Path) -> tuple[File, ...]:
    """The model in `path` and the file of weights of the model that it is or is a form of."""
    return tuple(File.of(file) for file in (path, written.with_name(f"{written.name}.data")) if file.exists())


def _arrays_of(cases: Cases) -> list[Arrays]:
    return [{key: value.numpy() for key, value in case.items()} for case in cases]


@torch.no_grad()
def _quantised(graph: Graph, say: Callable[[str], None]) -> nn.Module:
    """The module with as many int8 layers as its tolerance allows, simulated in fp32. Raises OutputError where too few would be left."""
    if graph.tensor_of is not None:
        raise InputError(f"{graph.name} of this size is exported in int8-weights or int4-weights, not int8: its activations have outliers")
    shared = {id(tensor): tensor for tensor in (*graph.module.parameters(), *graph.module.buffers())}
    seen = calibrate(graph.module, graph.calibration)
    keep: list[str] = []
    limit = SIMULATED * graph.tolerance
    worst_first: list[str] = []
    for share in KEPT:
        keep = worst_first[: int(share * len(worst_first))]
        module = copy.deepcopy(graph.module, dict(shared))
        errors = quantise(module, seen, keep)
        worst_first = worst_first or sorted(errors, key=lambda name: -errors[name])
        error = max(graph.error(i, _arrays(module(**case), graph.outputs)) for i, case in enumerate(graph.scored[:2]))
        if error <= limit:
            say(f"{graph.name}: {len(errors)} of {len(layers(graph.module))} layers in int8, simulated error {error:.2g}")
            return module
        if error > 10 * graph.tolerance:
            break
    digits = digits_apart(error, limit)
    raise OutputError(
        f"graph {graph.name} in int8 is {error:.{digits}g} off PyTorch (simulated, {len(keep)} layers kept), allowed is "
        f"{limit:.{digits}g}, {SIMULATED:.0%} of the tolerance {graph.tolerance:.2g}: bf16 between the products may take the rest"
    )


def _arrays(outputs: Tensor | tuple[Tensor, ...], names: Sequence[str]) -> Arrays:
    return {name: value.numpy() for name, value in zip(names, outputs if isinstance(outputs, tuple) else (outputs,), strict=True)}


def _drop_unused(graph: Graph, taken: Sequence[Variant], folder: Path) -> None:
    """Removes files of variants that were not taken."""
    listed = {file.path for each in taken for file in each.files}
    for file in folder.glob(f"{graph.name}-*"):
        if file.name not in listed:
            file.unlink()
