"""The precision of each graph: as people write it, and the variants that it means."""

from collections.abc import Mapping

from snoopi_rt.bundle.bundle import GRAPHS, Bundle, Variant
from snoopi_rt.errors import InputError


def parse_precision(text: str) -> dict[str, str]:
    """The precision by graph: "int8" is that of all graphs, "generator=int8,decoder=fp16" those of the graphs that it names.

    Raises InputError for an unknown graph, one named twice and a missing name. Which precisions there are, the bundle knows.
    """
    if text.strip() and not {"=", ","} & set(text):
        return dict.fromkeys(GRAPHS, text.strip())
    given: dict[str, str] = {}
    for part in text.split(","):
        graph, _, name = (word.strip() for word in part.partition("="))
        if not graph or not name:
            raise InputError(f"precision {text!r} is neither one name, such as int8, nor graph=name,graph=name")
        if graph not in GRAPHS:
            raise InputError(f"precision {text!r}: unknown graph {graph!r}, choose from {', '.join(GRAPHS)}")
        if graph in given:
            raise InputError(f"precision {text!r} names {graph} twice")
        given[graph] = name
    return given


def format_precision(variants: Mapping[str, Variant]) -> str:
    """The variants' precisions as `parse_precision` reads them."""
    return format_names({graph: variant.precision for graph, variant in variants.items()})


def format_names(names: Mapping[str, str]) -> str:
    """The precisions by graph as `parse_precision` reads them."""
    alike = set(names.values())
    return alike.pop() if len(alike) == 1 else ",".join(f"{graph}={name}" for graph, name in names.items())


def select_variants(bundle: Bundle, engine: str, precision: str | Mapping[str, str] | None = None) -> dict[str, Variant]:
    """The variant of every graph for the engine, the bundle's first where no precision is given.

    Graphs have their own precisions, so a single name is that of the graphs that have it. Raises BundleError for an engine that the bundle
    does not serve, InputError for a precision or graph that it has not.
    """
    variants = {graph: bundle.variant(graph, engine) for graph in bundle.graphs}
    if precision is None:
        return variants
    given = parse_precision(precision) if isinstance(precision, str) else precision
    if isinstance(precision, str) and "=" not in precision:
        known = {graph: {variant.precision for variant in bundle.variants(graph, engine)} for graph in variants}
        given = {graph: name for graph, name in given.items() if name in known.get(graph, ())}
        if not given:
            names = ", ".join(sorted(set().union(*known.values())))
            raise InputError(f"bundle {bundle.name!r} has no precision {precision!r} for engine {engine!r}, choose from {names}")
    if unknown := given.keys() - variants.keys():
        raise InputError(f"bundle {bundle.name!r} has no graph {min(unknown)!r}, choose from {', '.join(variants)}")
    return {graph: bundle.variant(graph, engine, given.get(graph)) for graph in variants}
