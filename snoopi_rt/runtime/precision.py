"""The precision of each graph: as people write it, and the builds that it means."""

from collections.abc import Mapping

from snoopi_rt.bundle.bundle import GRAPHS, Build, Bundle
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


def format_precision(builds: Mapping[str, Build]) -> str:
    """The builds' precisions as `parse_precision` reads them."""
    return format_names({graph: build.precision for graph, build in builds.items()})


def format_names(names: Mapping[str, str]) -> str:
    """The precisions by graph as `parse_precision` reads them."""
    alike = set(names.values())
    return alike.pop() if len(alike) == 1 else ",".join(f"{graph}={name}" for graph, name in names.items())


def select_builds(bundle: Bundle, engine: str, precision: str | Mapping[str, str] | None = None) -> dict[str, Build]:
    """The build of every graph for the engine, the bundle's first where no precision is given.

    Graphs have their own precisions, so a single name is that of the graphs that have it. Raises BundleError for an engine that the bundle
    does not serve, InputError for a precision or graph that it has not.
    """
    builds = {graph: bundle.build(graph, engine) for graph in bundle.graphs}
    if precision is None:
        return builds
    given = parse_precision(precision) if isinstance(precision, str) else precision
    if isinstance(precision, str) and "=" not in precision:
        known = {graph: {build.precision for build in bundle.builds(graph, engine)} for graph in builds}
        given = {graph: name for graph, name in given.items() if name in known.get(graph, ())}
        if not given:
            names = ", ".join(sorted(set().union(*known.values())))
            raise InputError(f"bundle {bundle.name!r} has no precision {precision!r} for engine {engine!r}, choose from {names}")
    if unknown := given.keys() - builds.keys():
        raise InputError(f"bundle {bundle.name!r} has no graph {min(unknown)!r}, choose from {', '.join(builds)}")
    return {graph: bundle.build(graph, engine, given.get(graph)) for graph in builds}
