"""The engine and the precisions that `auto` means on this machine: the fastest that was measured, or else the first installed."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.engines import check_engine, installed, versions
from snoopi_rt.engines.compiled_cache import processor
from snoopi_rt.engines.threads import available_threads
from snoopi_rt.errors import BundleError, InputError
from snoopi_rt.runtime.precision import select_variants

ORDER = ("cpu", "openvino")


@dataclass(frozen=True)
class Choice:
    """An engine, and the precision of each graph of the bundle."""

    engine: str
    precision: dict[str, str]


@dataclass(frozen=True)
class EngineTiming:
    """The precision of the fastest variant of each graph on an engine, and the seconds per image with those."""

    precision: dict[str, str]
    seconds: float


def choose_engine(bundle: Bundle, cache: Cache, precision: str | None = None) -> Choice:
    """The engine and precisions for `auto`; engines that have the requested precision come first.

    Raises EngineMissing if no engine is installed, BundleError if the bundle supports none of those that are.
    """
    available = set(installed()) & set(bundle.engines())
    measured = {engine: measurement for engine, measurement in measurements(bundle, cache).items() if engine in available}
    for engine in sorted(measured, key=lambda name: measured[name].seconds):
        if _supports(bundle, engine, precision):
            return Choice(engine, measured[engine].precision)
    candidates = usable(bundle)
    engine = next((name for name in candidates if _supports(bundle, name, precision)), candidates[0])
    return Choice(engine, {graph: bundle.variant(graph, engine).precision for graph in bundle.graphs})


def _supports(bundle: Bundle, engine: str, precision: str | None) -> bool:
    with suppress(BundleError, InputError):
        select_variants(bundle, engine, precision)
        return True
    return False


def usable(bundle: Bundle) -> list[str]:
    """The installed engines that the bundle supports and that work on every machine. Raises as `choose_engine` does."""
    available = [name for name in ORDER if name in installed()]
    if not available:
        check_engine(ORDER[0])
    candidates = [name for name in available if name in bundle.engines()]
    if not candidates:
        raise BundleError(
            f"bundle {bundle.name!r} supports {', '.join(bundle.engines()) or 'no engine'}, installed are {', '.join(available)}"
        )
    return candidates


def measurements(bundle: Bundle, cache: Cache) -> dict[str, EngineTiming]:
    """The measurements of this bundle on this machine as it is now, by engine; unreadable ones are ignored."""
    try:
        document = json.loads(cache.read("measurements", _file(bundle)) or b"{}")
        # Compared last: it takes some milliseconds, and most bundles were not measured.
        if not document or document["machine"] != machine():
            return {}
        records = document["engines"].items()
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}
    measured = {}
    for engine, record in records:
        with suppress(BundleError, KeyError, TypeError, ValueError):
            measured[engine] = _measurement(bundle, engine, record)
    return measured


def remember(bundle: Bundle, cache: Cache, measured: dict[str, EngineTiming]) -> None:
    """Stores measurements beside those of other engines on this machine."""
    engines = {engine: asdict(measurement) for engine, measurement in {**measurements(bundle, cache), **measured}.items()}
    cache.write("measurements", _file(bundle), json.dumps({"machine": machine(), "engines": engines}).encode())


def machine() -> dict[str, Any]:
    """What invalidates measurements when it changes: processor, threads and the engines' versions."""
    return {"processor": processor(), "threads": available_threads(), "engines": versions()}


def _file(bundle: Bundle) -> str:
    return f"{bundle.hash}.json"


def _measurement(bundle: Bundle, engine: str, record: dict[str, Any]) -> EngineTiming:
    """The measurement in a record. Raises BundleError, KeyError, TypeError or ValueError if it does not fit the bundle."""
    precision = {graph: bundle.variant(graph, engine, record["precision"][graph]).precision for graph in bundle.graphs}
    if type(record["seconds"]) is not float:
        raise TypeError("seconds must be a number")
    return EngineTiming(precision, record["seconds"])
