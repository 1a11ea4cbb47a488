"""The precision of each graph: as users write it, the variants it selects, and the engine that runs each."""

from collections.abc import Mapping

from snoopi_rt.bundle.bundle import GRAPHS, TEXT_ENGINE, Bundle, Variant
from snoopi_rt.engines import variant_names
from snoopi_rt.errors import InputError


def parse_precision(text: str) -> dict[str, str]:
    """The precision by graph: "int8" applies to all graphs, "generator=int8,decoder=fp16" to the named ones.

    Raises InputError for an unknown or repeated graph and for a missing name. Whether a precision exists depends on the bundle.
    """
    if text.strip() and not {"=", ","} & set(text):
        return dict.fromkeys(GRAPHS, text.strip())
    precisions: dict[str, str] = {}
    for part in text.split(","):
        graph, _, name = (word.strip() for word in part.partition("="))
        if not graph or not name:
            raise InputError(f"precision {text!r} is neither one name, such as int8, nor graph=name,graph=name")
        if graph not in GRAPHS:
            raise InputError(f"precision {text!r}: unknown graph {graph!r}, choose from {', '.join(GRAPHS)}")
        if graph in precisions:
            raise InputError(f"precision {text!r} names {graph} twice")
        precisions[graph] = name
    return precisions


def format_precision(variants: Mapping[str, Variant]) -> str:
    """The precisions of variants in the form that `parse_precision` reads."""
    return format_names({graph: variant.precision for graph, variant in variants.items()})


def format_names(names: Mapping[str, str]) -> str:
    """Precisions by graph in the form that `parse_precision` reads."""
    distinct = set(names.values())
    return distinct.pop() if len(distinct) == 1 else ",".join(f"{graph}={name}" for graph, name in names.items())


def select_variants(bundle: Bundle, engine: str, precision: str | Mapping[str, str] | None = None) -> dict[str, Variant]:
    """The variant of every graph for the engine, by default the bundle's first.

    Graphs differ in their precisions, so a single name applies to the graphs that have it. Raises BundleError for an engine that the bundle
    does not support, InputError for a precision or graph that it does not have.
    """
    variants = {graph: bundle.variant(graph, engine) for graph in bundle.graphs}
    if precision is None:
        return variants
    precisions = parse_precision(precision) if isinstance(precision, str) else precision
    if isinstance(precision, str) and "=" not in precision:
        known = {graph: {variant.precision for variant in bundle.variants(graph, engine)} for graph in variants}
        precisions = {graph: name for graph, name in precisions.items() if name in known.get(graph, ())}
        if not precisions:
            names = ", ".join(sorted(set().union(*known.values())))
            raise InputError(f"bundle {bundle.name!r} has no precision {precision!r} for engine {engine!r}, choose from {names}")
    if unknown := precisions.keys() - variants.keys():
        raise InputError(f"bundle {bundle.name!r} has no graph {min(unknown)!r}, choose from {', '.join(variants)}")
    return {graph: bundle.variant(graph, engine, precisions.get(graph)) for graph in variants}


def runs_on(variant: Variant, engine: str) -> str:
    """The engine that runs the variant of a pipeline on `engine`: a text encoder may run on another."""
    return engine if {*variant_names(engine)} & {*variant.engines} else TEXT_ENGINE
