"""How far apart two engines or two bundles are on the same graphs, per output or per node, run by Polygraphy's Comparator.

Needs the extra `export` or `tensorrt`; nothing that draws imports it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnx import modify_outputs
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.constants import MARK_ALL
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from snoopi_rt.bundle.bundle import GRAPHS, Bundle, Variant
from snoopi_rt.cache import Cache
from snoopi_rt.engines import check_engine, load_engine
from snoopi_rt.engines.base import Engine
from snoopi_rt.errors import EngineError, InputError
from snoopi_rt.loading import open_pipeline
from snoopi_rt.runtime.inputs import generator_inputs
from snoopi_rt.runtime.precision import runs_on, select_variants
from snoopi_rt.runtime.shape_ranges import shape_ranges

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Distance:
    """The distance of an output from the first side's. `node`: the node that computes it, for people; empty without `layers`.

    Both figures are infinite if the shapes differ, or if one side has NaN or infinity where the other has not. NaN in both is no distance.
    """

    output: str
    max_abs: float
    relative_l2: float
    broken: tuple[bool, bool] = (False, False)
    """Whether the first and the second side have NaN, or an infinity that the other has not (a mask has infinities in both)."""
    node: str = ""


@dataclass(frozen=True)
class Comparison:
    """A graph on two sides; `distances` are in topological order, those of all nodes or of the graph's outputs alone."""

    graph: str
    first: str
    second: str
    distances: tuple[Distance, ...]

    def first_beyond(self, tolerance: float) -> Distance | None:
        """The first output whose relative L2 is beyond the tolerance."""
        return next((distance for distance in self.distances if not distance.relative_l2 <= tolerance), None)

    def first_broken(self) -> Distance | None:
        """The first output that has NaN on a side."""
        return next((distance for distance in self.distances if any(distance.broken)), None)

    def described(self, distance: Distance) -> str:
        """The two figures, and which side is broken."""
        broken = [side for side, is_broken in zip((self.first, self.second), distance.broken, strict=True) if is_broken]
        remark = f", NaN or infinity on {' and '.join(broken)}" if broken else ""
        return f"max abs {distance.max_abs:.2e}, relative L2 {distance.relative_l2:.2e}{remark}"


@dataclass(frozen=True)
class Side:
    """A bundle on an engine, and the variant of each graph that it runs."""

    bundle: Bundle
    engine: str
    variants: dict[str, Variant]

    @classmethod
    def of(cls, bundle: Bundle, engine: str, precision: str | None = None) -> "Side":
        """precision: of one of the graphs' variants, the bundle's first by default. Raises BundleError, EngineMissing, InputError."""
        check_engine(engine)
        return cls(bundle, engine, select_variants(bundle, engine, precision))

    def path(self, graph: str) -> Path:
        """The graph's model file."""
        return self.bundle.folder / self.variants[graph].files[0].path

    def label(self, graph: str) -> str:
        """The engine and its precision, for people."""
        variant = self.variants[graph]
        return f"{runs_on(variant, self.engine)} {variant.precision}"


class EngineRunner(BaseRunner):
    """One of our engines as a Polygraphy runner, with exactly the session options, providers and build flags with which it draws."""

    def __init__(self, name: str, open_engine: Callable[[], Engine]) -> None:
        super().__init__(name=name)
        self._open_engine = open_engine

    def activate_impl(self) -> None:
        self._engine = self._open_engine()

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for spec in self._engine.inputs:
            metadata.add(spec.name, np.dtype(spec.dtype), spec.shape)
        return metadata

    def infer_impl(self, feed_dict: Arrays) -> Arrays:
        start = time.perf_counter()
        outputs = {name: np.asarray(value) for name, value in self._engine(**feed_dict).items()}
        self.inference_time = time.perf_counter() - start
        return outputs

    def deactivate_impl(self) -> None:
        self._engine.close()
        del self._engine


def compare(
    first: Side,
    second: Side,
    graphs: Sequence[str],
    prompt: str,
    negative: str | None,
    layers: bool = False,
    threads: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Iterator[Comparison]:
    """Compares each of the graphs on two sides with the same inputs.

    The inputs are those of the first side for the prompt, so that errors do not carry over from graph to graph. With `layers` every
    node's output is compared; all of them are in memory at once, unless POLYGRAPHY_ARRAY_SWAP_THRESHOLD_MB is set.
    Raises BundleError, EngineError, InputError.
    """
    for side in (first, second):
        for graph in graphs:
            if graph not in side.variants:
                raise InputError(f"bundle {side.bundle.name!r} has no graph {graph!r}, choose from {', '.join(side.variants)}")
            if layers and side.variants[graph].format != "onnx":
                raise InputError(f"--layers needs ONNX, and {graph} is {side.variants[graph].format} on engine {side.engine!r}")
    latent = np.empty(0, np.float32)
    for graph in GRAPHS:
        if graph not in graphs and not (graph == "generator" and "decoder" in graphs):
            continue
        # One after the other: a text encoder that gives NaN is compared before the generator's inputs fail for it.
        if graph == "text_encoder":
            inputs = {"ids": first.bundle.open_tokenizer()(prompt, truncate=True)}
        elif graph == "generator":
            inputs = _generator_inputs(first, prompt, negative, threads)
        else:
            tile = first.bundle.tile.size if first.bundle.tile else None
            inputs = {"latent": np.ascontiguousarray(latent[:, :, :tile, :tile])}
        sides = (first, second) if graph in graphs else (first,)
        for side in sides:
            _check_inputs(graph, side, inputs)
        with _models(graph, sides, layers and graph in graphs) as (paths, nodes):
            runners = []
            for number, (side, path) in enumerate(zip(sides, paths, strict=True), 1):
                report(f"running {graph} on {side.label(graph)}")
                runners.append(EngineRunner(f"{number}: {side.label(graph)}", partial(_open, graph, side, path, threads)))
            outputs = _run(runners, inputs)
        if graph == "generator":
            latent = outputs[0]["latent"]
        if graph in graphs:
            distances = tuple(_distances(outputs[0], outputs[1], nodes))
            if not distances:
                raise InputError(f"{graph}: the two graphs have no output of the same name")
            yield Comparison(graph, *labels(first, second, graph), distances)


def labels(first: Side, second: Side, graph: str) -> tuple[str, str]:
    """What tells the two sides apart: their engines and precisions, and the bundles' folders if there are two."""
    if first.bundle.folder == second.bundle.folder:
        return first.label(graph), second.label(graph)
    one, other = first.bundle.folder, second.bundle.folder
    names = (one.name, other.name) if one.name != other.name else (str(one), str(other))
    return f"{names[0]} {first.label(graph)}", f"{names[1]} {second.label(graph)}"


def _generator_inputs(side: Side, prompt: str, negative: str | None, threads: int | None) -> Arrays:
    """The generator's inputs for a prompt; the engine computes its states. Raises OutputError if one is NaN."""
    bundle, precision = side.bundle, {graph: variant.precision for graph, variant in side.variants.items()}
    with open_pipeline(bundle, side.engine, precision, threads, Cache(), low_memory=True) as pipe:
        requests = pipe.check(prompt, negative, seed=0, truncate=True)
        states = {text: pipe.prepare(text, truncate=True).states for text in requests[0].texts}
    return generator_inputs(requests, states, side.variants["generator"].inputs, bundle.latent, bundle.sizes[0])


def _check_inputs(graph: str, side: Side, inputs: Arrays) -> None:
    """Raises InputError unless the side's graph takes these inputs."""
    specs = {spec.name: spec for spec in side.variants[graph].inputs}
    if specs.keys() != inputs.keys() or not all(specs[name].fits(array) for name, array in inputs.items()):
        named = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in inputs.items())
        raise InputError(f"{graph} of bundle {side.bundle.name!r} does not take the first side's inputs: {named}")


@contextmanager
def _models(graph: str, sides: Sequence[Side], layers: bool) -> Iterator[tuple[list[Path], dict[str, str]]]:
    """The model file of each side, with `layers` a copy whose tensors are all outputs; and the node that computes each output."""
    paths = [side.path(graph) for side in sides]
    if not layers:
        yield paths, {}
        return
    with Cache().scratch() as folder:
        nodes: dict[str, str] = {}
        for number, path in enumerate(paths):
            model = onnx.load(str(path))
            if number == 0:
                nodes = {output: f"{node.op_type} {node.name or output!r}" for node in model.graph.node for output in node.output}
            paths[number] = folder / str(number) / path.name
            paths[number].parent.mkdir()
            onnx.save(modify_outputs(model, MARK_ALL), str(paths[number]), save_as_external_data=True, location="weights.data")
        yield paths, nodes


def _open(graph: str, side: Side, path: Path, threads: int | None) -> Engine:
    variant, ranges = side.variants[graph], shape_ranges(side.bundle, graph, side.variants[graph])
    cache = Cache() if path.parent == side.bundle.folder else None  # a model with all tensors as outputs is compiled only once
    return load_engine(runs_on(variant, side.engine), path, variant.precision, threads, cache, variant.hash, ranges)


def _run(runners: list[EngineRunner], inputs: Arrays) -> list[Any]:
    """The outputs of each runner. Raises what an engine raises, EngineError if Polygraphy fails."""
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            results = Comparator.run(runners, data_loader=[inputs])
    except PolygraphyException as error:
        raise EngineError(f"Polygraphy failed: {error}") from error
    return [iterations[0] for _, iterations in results.items()]


def _distances(first: Any, second: Any, nodes: dict[str, str]) -> Iterator[Distance]:
    """The distances of the outputs that both have, in the order of `nodes`, or else of the first."""
    for name in nodes or first.keys():
        if name in first and name in second:
            yield replace(distance(name, first[name], second[name]), node=nodes.get(name, ""))


def distance(name: str, first: np.ndarray, second: np.ndarray) -> Distance:
    """The distance of the second array from the first."""
    if first.shape != second.shape:
        return Distance(name, float("inf"), float("inf"))
    reference, other = first.astype(np.float64), second.astype(np.float64)
    broken = tuple(bool((~np.isfinite(array) & (reference != other)).any()) for array in (reference, other))
    same = (reference == other) | (np.isnan(reference) & np.isnan(other))  # including infinities in both, such as those of a mask
    with np.errstate(invalid="ignore"):
        difference = np.abs(np.where(same, 0, reference - other))
    if not np.isfinite(difference).all():
        return Distance(name, float("inf"), float("inf"), (broken[0], broken[1]))
    norm = float(np.linalg.norm(np.where(np.isfinite(reference), reference, 0)))
    apart = float(np.linalg.norm(difference))
    return Distance(name, float(difference.max(initial=0)), apart / norm if norm else apart and float("inf"), (broken[0], broken[1]))
