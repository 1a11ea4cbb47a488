"""A bundle and the name of an engine to a pipeline: which variants, from which files, opened how."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.engines import known_engine, load_engine
from snoopi_rt.engines.base import Engine, Progress
from snoopi_rt.errors import BundleError, InputError
from snoopi_rt.pipeline import EMBEDDED, Pipeline
from snoopi_rt.request import integer
from snoopi_rt.runtime.auto_engine import choose_engine
from snoopi_rt.runtime.precision import runs_on, select_variants
from snoopi_rt.runtime.shape_ranges import shape_ranges

Weights = Literal["auto", "memory", "mapped"]
MAX_THREADS = 1024
"""More than cores that share memory: with tens of thousands an engine starts for minutes, and takes no signal meanwhile."""
AUTO_MEMORY_BYTES = 2 * 2**30
"""Weights of more bytes than these are mapped if `weights` is "auto"."""


def load(
    bundle: str | Path | Bundle | None = None,
    engine: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
    low_memory: bool = False,
    progress: Progress | None = None,
    weights: Weights = "mapped",
) -> Pipeline:
    """The pipeline of a bundle (a folder; None = the embedded one) on an engine.

    `engine` "auto" takes the fastest that `snoopi-rt bench` measured here, with its precisions, else `cpu`, then `openvino`; `precision` is
    one of the bundle's, or one per graph ("generator=int8,decoder=fp16"); `threads` bounds the CPU threads; with `low_memory` the
    memory's peak is that of the text encoder or that of the rest, not both: a new prompt then waits for models to be opened again.
    An engine that compiles for minutes calls progress(what, share of it that is done, 0 to 1) meanwhile. `weights` "mapped" leaves them
    in the bundle's files, which saves memory, but another bundle copied over them ends the process; "memory" reads them; "auto" does so
    up to 2 GiB.
    Raises BundleError, EngineMissing, EngineError, InputError.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.load(EMBEDDED if bundle is None else bundle)
    cache = Cache()
    chosen: str | Mapping[str, str] | None = precision
    if engine == "auto":
        choice = choose_engine(opened, cache, precision)
        engine, chosen = choice.engine, choice.precision if precision is None else precision
    return open_pipeline(opened, engine, chosen, threads, cache, low_memory, progress, weights)


def open_pipeline(
    bundle: Bundle,
    engine: str,
    precision: str | Mapping[str, str] | None,
    threads: int | None,
    cache: Cache,
    low_memory: bool = False,
    progress: Progress | None = None,
    weights: Weights = "mapped",
) -> Pipeline:
    """The pipeline of a bundle on an engine by its own name, with its files in the cache. Raises as `load` does."""
    known_engine(engine)
    if threads is not None:
        integer("threads", threads, 1, MAX_THREADS)
    if weights not in get_args(Weights):
        raise InputError(f"unknown weights {weights!r}, choose from {', '.join(get_args(Weights))}")
    variants = select_variants(bundle, engine, precision)
    size = sum(file.size for variant in variants.values() for file in variant.files)
    mapped = weights == "mapped" or (weights == "auto" and size > AUTO_MEMORY_BYTES)

    def open_engine(graph: str) -> Engine:
        variant = variants[graph]
        name = runs_on(variant, engine)
        path = bundle.folder / variant.files[0].path
        ranges = shape_ranges(bundle, graph, variant)
        bundle.check_again(variant.files)
        opened = load_engine(name, path, variant.precision, threads, cache, variant.hash, ranges, progress, mapped)
        try:
            bundle.check_again(variant.files)  # else what was opened may be another file
            variant.check_graph(opened.inputs, opened.outputs)
        except BundleError:
            opened.close()
            raise
        return opened

    return Pipeline(bundle, open_engine, engine, precision, cache, low_memory)
