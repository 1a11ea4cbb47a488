"""One graph to its variants: every precision is written, measured on each of its engines, and kept if it is close enough to PyTorch."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from snoopi_rt.bundle.bundle import File, Parity, Variant
from snoopi_rt.bundle.variant import digits_apart
from snoopi_rt.bundle.verify import Stamp, hash_file, stamp
from snoopi_rt.cache import Cache
from snoopi_rt.engines.openvino import NO_BF16
from snoopi_rt.errors import InputError, OutputError
from snoopi_rt.export.onnx_graphs.engine_rewrites import one_image_bf16, onnxruntime_operators
from snoopi_rt.export.onnx_graphs.mixed_precision import GpuPrecision, simulate_gpu, to_gpu_precision
from snoopi_rt.export.onnx_graphs.parity import LatentComparison, NamedArrays, measure
from snoopi_rt.export.onnx_graphs.quantise import calibrate, quantisable_layers, quantise
from snoopi_rt.export.onnx_graphs.weight_compression import WeightFormat
from snoopi_rt.export.onnx_graphs.write import write_graph

GraphInputs = Sequence[Mapping[str, Tensor]]
"""Inputs of a graph by name, of batch 1 each."""


@dataclass(frozen=True)
class Precision:
    """How one precision is stored and on which engines it runs.

    Arithmetic is fp32, except on OpenVINO, where it is bf16 in bf16 and between the products of int8.
    """

    engines: tuple[str, ...]
    weights: WeightFormat = "fp16"
    weights_of: str | None = None
    """The precision whose file it reads; none: it has a file of its own."""
    bf16: bool = False
    """Whether OpenVINO gets a graph for one image at a time (engine_rewrites.one_image_bf16)."""


PRECISIONS = {
    "fp32": Precision(("cpu", "openvino"), "fp32"),
    "fp16": Precision(("cpu", "openvino")),
    "bf16": Precision(("openvino",), weights_of="fp16", bf16=True),
    "int8": Precision(("cpu", "openvino"), bf16=True),
    "int8-weights": Precision(("cpu", "openvino"), "int8"),
    "int4-weights": Precision(("cpu", "openvino"), "int4"),
}
AUTO = ("int8", "bf16")
"""The fast precisions, fastest first: `auto` takes the first that is close enough, and fp16 (else fp32) for every engine."""
FALLBACKS = {
    "int4-weights": ("int8-weights", "fp16", "fp32"),
    "int8": ("int8-weights", "fp16", "fp32"),
    "int8-weights": ("fp16", "fp32"),
    "bf16": ("fp16", "fp32"),
    "fp16": ("fp32",),
}
"""What replaces a precision that a graph cannot have, the first choice first; all of them run on both engines."""
GPU_ENGINES = ("tensorrt", "cuda")
GPU_PRECISIONS: tuple[GpuPrecision, ...] = ("fp16", "bf16")
"""The GPU engines get the first of these that is close enough; it is the type of their arithmetic too."""
LARGE_ENGINES = ("cpu",)
"""The engines for a graph larger than the memory: OpenVINO holds packed weights two to three times (T5-XXL: 14.9 GB), at half the speed."""
INT8_CONVOLUTIONS = ("openvino",)
"""The engines whose int8 convolutions give wider tensors; ONNX Runtime's give int8, which rounds once more."""
SIMULATED_SHARE = 0.7
"""The share of its tolerance that int8 may use while it is simulated in fp32: later, activations between the products are bf16."""
UNQUANTISED_SHARES = (0.0, 0.05, 0.15, 0.35)
"""Shares of the layers, worst first, that int8 leaves unquantised, tried in turn until the error is small enough."""


@dataclass(frozen=True)
class Graph:
    """A graph before it is written."""

    name: str
    module: nn.Module
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]
    """Input name to {axis: axis name}."""
    example: Mapping[str, Tensor]
    """Inputs of batch 2."""
    calibration: GraphInputs
    evaluation: GraphInputs
    reference: Sequence[NamedArrays]
    """PyTorch's outputs of `evaluation`, in fp32."""
    error: Callable[[int, NamedArrays], float]
    """error(i, outputs) of evaluation sample i: what `tolerance` bounds, except in fp32; with a `comparison` it is that one's error."""
    tolerance: float
    fp32_tolerance: float
    """The largest relative L2 distance of the variant in fp32."""
    opset: int
    int8_tolerance: float | None = None
    """What bounds the error of int8 instead of `tolerance` if int8 is asked for by name; None: `tolerance`."""
    comparison: LatentComparison | None = None
    one_image: bool = False
    """Whether it runs one image at a time, whatever the precision."""
    tensor_of: Callable[[str], Tensor] | None = None
    """Gives the tensors of a module on the meta device by name, see write_graph."""


def check_precision(name: str) -> None:
    """Returns for a precision that a graph can be exported in, else raises InputError."""
    if name not in ("auto", *PRECISIONS):
        raise InputError(f"unknown precision {name!r}, choose from auto, {', '.join(PRECISIONS)}")


def write_variants(
    graph: Graph,
    precisions: Sequence[str],
    folder: Path,
    engines: Sequence[str],
    say: Callable[[str], None],
    or_nearest: Collection[str] = (),
) -> tuple[Variant, ...]:
    """The graph's variants in the order of `precisions`, their files in `folder`; parity is measured on `engines`.

    For a precision in `or_nearest` that the graph cannot have, it gets the nearest that it can. Raises OutputError if another that was
    asked for by name is beyond its tolerance, InputError if the graph cannot have it at all.
    """
    written: dict[str, list[Variant]] = {}
    for precision in precisions:
        fallbacks = FALLBACKS.get(precision, ()) if precision in or_nearest else ()
        # Of each group the first that is close enough is taken.
        for group in _auto_groups(graph) if precision == "auto" else ((precision, *fallbacks),):
            for name in group:
                supported = PRECISIONS[name].engines if graph.tensor_of is None else LARGE_ENGINES
                usable = [engine for engine in supported if engine in engines]
                if not usable and precision != "auto":
                    raise InputError(f"precision {name} of {graph.name} is for {', '.join(supported)}, which is not installed")
                if name not in written and usable:
                    judged = graph
                    if name == precision == "int8" and graph.int8_tolerance is not None:
                        judged = replace(graph, tolerance=graph.int8_tolerance)
                        say(
                            f"{graph.name}: int8 is asked for by name and may change the clean latent by {judged.tolerance:g}, "
                            f"others by {graph.tolerance:g}; --tolerance sets another limit"
                        )
                    try:
                        written[name] = _write_precision(judged, name, folder, usable, say)
                    except (InputError, OutputError) as error:
                        if name == "fp32" or len(group) == 1:
                            raise
                        say(f"{graph.name}: {name} is not taken: {error}")
                        continue
                    for variant in written[name]:
                        say(f"{graph.name}: {variant.described()}")
                if name in written:
                    break
    variants = [variant for group in written.values() for variant in group]
    if graph.tensor_of is None:
        variants += _write_gpu_variants(graph, precisions, folder, engines[0], say)
    _remove_unused(graph, variants, folder)
    return tuple(variants)


def _auto_groups(graph: Graph) -> Sequence[Sequence[str]]:
    """A fast precision if there is one and a wide one for every engine; one packed precision for a graph larger than the memory."""
    return (AUTO, ("fp16", "fp32")) if graph.tensor_of is None else (("int8-weights", "fp16", "fp32"),)


def _write_precision(graph: Graph, name: str, folder: Path, engines: Sequence[str], say: Callable[[str], None]) -> list[Variant]:
    """The variant of one precision, or one for each engine that has a graph of its own."""
    precision = PRECISIONS[name]
    base = folder / f"{graph.name}-{precision.weights_of or name}.onnx"
    if name == "int8" and any(isinstance(layer, nn.Conv2d) for layer in quantisable_layers(graph.module).values()):
        engines = [engine for engine in engines if engine in INT8_CONVOLUTIONS]
        if not engines:
            raise OutputError(f"graph {graph.name} has convolutions, which in int8 are for {', '.join(INT8_CONVOLUTIONS)}, not installed")
    module = _quantised(graph, say) if name == "int8" else graph.module
    _write_once(graph, module, base, precision.weights)
    engines_of: dict[Path, list[str]] = {}
    for engine in engines:
        rewritten = folder / f"{graph.name}-{name}-{engine}.onnx"
        rewrites = onnxruntime_operators(base, rewritten) if engine == "cpu" else precision.bf16 and one_image_bf16(base, rewritten)
        engines_of.setdefault(rewritten if rewrites else base, []).append(engine)
    return [_measured_variant(graph, name, path, base, on, say) for path, on in engines_of.items()]


def _write_gpu_variants(graph: Graph, precisions: Sequence[str], folder: Path, engine: str, say: Callable[[str], None]) -> list[Variant]:
    """The variants for GPU engines that are close enough: all that are asked for by name, for `auto` the first."""
    named, variants = [precision for precision in GPU_PRECISIONS if precision in precisions], []
    for precision in named or (GPU_PRECISIONS if "auto" in precisions else ()):
        try:
            variants.append(_write_gpu_variant(graph, precision, folder, engine))
        except (InputError, OutputError) as error:
            say(f"{graph.name}: {precision} is not taken for {' and '.join(GPU_ENGINES)}: {error}")
            if isinstance(error, InputError):
                break
        else:
            say(f"{graph.name}: {variants[-1].described()}")
            if not named:
                break
    return variants


def _write_gpu_variant(graph: Graph, precision: GpuPrecision, folder: Path, engine: str) -> Variant:
    """The variant for GPU engines, measured on `engine` with the output of every operator rounded as a GPU rounds it."""
    base = folder / f"{graph.name}-{PRECISIONS['bf16'].weights_of}.onnx"
    _write_once(graph, graph.module, base, PRECISIONS["fp16"].weights)
    path, simulated = folder / f"{graph.name}-{precision}-gpu.onnx", folder / f"{graph.name}-rounded.onnx"
    to_gpu_precision(base, path, precision)
    simulate_gpu(path, simulated)
    try:
        measured = measure(graph.name, simulated, "fp16", (engine,), _arrays(graph.evaluation), graph.reference, graph.comparison)
    finally:
        simulated.unlink()
    _check_tolerance(graph, precision, measured.parity, f"{engine} with a GPU's rounding")
    files, max_batch = _files(path, base), 1 if graph.one_image else None
    return Variant(GPU_ENGINES, precision, "onnx", files, measured.inputs, measured.outputs, measured.parity, graph.tolerance, max_batch)


def _write_once(graph: Graph, module: nn.Module, path: Path, weights: WeightFormat) -> None:
    if not path.exists():
        write_graph(module, graph.example, graph.outputs, graph.dynamic, path, weights, graph.opset, graph.tensor_of)


def _measured_variant(graph: Graph, name: str, path: Path, base: Path, engines: Sequence[str], say: Callable[[str], None]) -> Variant:
    """The variant of the model in `path`, which is `base` or rewritten from it. Raises OutputError if it is beyond its tolerance."""
    measured = measure(graph.name, path, name, engines, _arrays(graph.evaluation), graph.reference, graph.comparison)
    parity, on = measured.parity, ", ".join(engines)
    if any(NO_BF16 in provider for provider in measured.providers):
        if name == "bf16":
            raise OutputError(f"graph {graph.name} in bf16 cannot be measured here{NO_BF16}")
        say(f"{graph.name}: {name} was measured with fp32 between its products{NO_BF16}: on one that has, the error is larger")
    if name == "fp32" and not parity.relative_l2 <= graph.fp32_tolerance:
        digits = digits_apart(parity.relative_l2, graph.fp32_tolerance)
        far = f"{parity.relative_l2:.{digits}g} (relative L2) off PyTorch on {on}, allowed is {graph.fp32_tolerance:.{digits}g}"
        raise OutputError(f"graph {graph.name} in fp32 is {far}")
    _check_tolerance(graph, name, parity, on)
    max_batch = 1 if graph.one_image or (path != base and "openvino" in engines) else None
    return Variant(tuple(engines), name, "onnx", _files(path, base), measured.inputs, measured.outputs, parity, graph.tolerance, max_batch)


def _check_tolerance(graph: Graph, name: str, parity: Parity, on: str) -> None:
    """Raises OutputError if a variant is beyond its tolerance."""
    if not parity.error <= graph.tolerance:
        digits = digits_apart(parity.error, graph.tolerance)
        off, allowed = parity.judged(digits), f"{graph.tolerance:.{digits}g}"
        raise OutputError(f"graph {graph.name} in {name} is {off} off PyTorch on {on}, allowed is {allowed}")


def _files(path: Path, base: Path) -> tuple[File, ...]:
    """The model in `path` and the weights of `base`, which it reads."""
    return tuple(_hashed(file, stamp(file)) for file in (path, base.with_name(f"{base.name}.data")) if file.exists())


@lru_cache(maxsize=8)
def _hashed(path: Path, stamp: Stamp) -> File:
    """The entry for a file, which is hashed once for all variants that share it."""
    return hash_file(path, Cache())


def _arrays(samples: GraphInputs) -> list[NamedArrays]:
    return [{name: value.numpy() for name, value in sample.items()} for sample in samples]


@torch.no_grad()
def _quantised(graph: Graph, say: Callable[[str], None]) -> nn.Module:
    """The module with as many int8 layers as its tolerance allows, simulated in fp32. Raises OutputError if too few would be left."""
    if graph.tensor_of is not None:
        raise InputError(f"{graph.name} of this size is exported in int8-weights or int4-weights, not int8: its activations have outliers")
    shared = {id(tensor): tensor for tensor in (*graph.module.parameters(), *graph.module.buffers())}
    statistics = calibrate(graph.module, graph.calibration)
    limit = SIMULATED_SHARE * graph.tolerance
    unquantised: list[str] = []
    worst_first: list[str] = []
    for share in UNQUANTISED_SHARES:
        unquantised = worst_first[: int(share * len(worst_first))]
        module = copy.deepcopy(graph.module, dict(shared))
        errors = quantise(module, statistics, unquantised)
        worst_first = worst_first or sorted(errors, key=lambda name: -errors[name])
        # NumPy's maximum of NaN is NaN.
        error = float(np.max([graph.error(i, _named(module(**sample), graph.outputs)) for i, sample in enumerate(graph.evaluation[:2])]))
        if error <= limit:
            say(f"{graph.name}: {len(errors)} of {len(quantisable_layers(graph.module))} layers in int8, simulated error {error:.2g}")
            return module
        if error > 10 * graph.tolerance:
            break
    digits = digits_apart(error, limit)
    raise OutputError(
        f"graph {graph.name} in int8 is {error:.{digits}g} off PyTorch (simulated, {len(unquantised)} layers kept), allowed is "
        f"{limit:.{digits}g}, {SIMULATED_SHARE:.0%} of the tolerance {graph.tolerance:.2g}: bf16 between the products may take the rest"
    )


def _named(outputs: Tensor | tuple[Tensor, ...], names: Sequence[str]) -> NamedArrays:
    return {name: value.numpy() for name, value in zip(names, outputs if isinstance(outputs, tuple) else (outputs,), strict=True)}


def _remove_unused(graph: Graph, variants: Sequence[Variant], folder: Path) -> None:
    """Removes the graph's files that no variant lists."""
    listed = {file.path for variant in variants for file in variant.files}
    for file in folder.glob(f"{graph.name}-*"):
        if file.name not in listed:
            file.unlink()
