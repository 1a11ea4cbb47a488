"""Which engine `auto` means on this machine, and in which precisions: what was measured to be fastest, else the first that is installed."""

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
class Measured:
    """The fastest variant of each graph on one engine, by its precision, and the seconds that an image takes with them."""

    precision: dict[str, str]
    seconds: float


def choose(bundle: Bundle, cache: Cache, precision: str | None = None) -> Choice:
    """The engine and precisions, of engines that have the `precision` that was asked for, if one has.

    Raises EngineMissing where no engine is installed, BundleError where the bundle serves none that is.
    """
    here = set(installed()) & set(bundle.engines())
    measured = {engine: found for engine, found in measurements(bundle, cache).items() if engine in here}
    for engine in sorted(measured, key=lambda name: measured[name].seconds):
        if _has(bundle, engine, precision):
            return Choice(engine, measured[engine].precision)
    candidates = usable(bundle)
    engine = next((name for name in candidates if _has(bundle, name, precision)), candidates[0])
    return Choice(engine, {graph: bundle.variant(graph, engine).precision for graph in bundle.graphs})


def _has(bundle: Bundle, engine: str, precision: str | None) -> bool:
    with suppress(BundleError, InputError):
        select_variants(bundle, engine, precision)
        return True
    return False


def usable(bundle: Bundle) -> list[str]:
    """The installed engines that the bundle serves, of those that work on every machine; raises as `choose` does."""
    here = [name for name in ORDER if name in installed()]
    if not here:
        check_engine(ORDER[0])
    candidates = [name for name in here if name in bundle.engines()]
    if not candidates:
        raise BundleError(f"bundle {bundle.name!r} serves {', '.join(bundle.engines()) or 'no engine'}, installed are {', '.join(here)}")
    return candidates


def measurements(bundle: Bundle, cache: Cache) -> dict[str, Measured]:
    """What each engine took with this bundle on this machine as it is now; what cannot be read was not measured."""
    try:
        document = json.loads(cache.read("measurements", _file(bundle)) or b"{}")
        # Told last: it costs some milliseconds, and most bundles were not measured.
        if not document or document["machine"] != machine():
            return {}
        records = document["engines"].items()
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}
    found = {}
    for engine, record in records:
        with suppress(BundleError, KeyError, TypeError, ValueError):
            found[engine] = _measured(bundle, engine, record)
    return found


def remember(bundle: Bundle, cache: Cache, measured: dict[str, Measured]) -> None:
    """Keeps measurements beside those of other engines on this machine."""
    engines = {engine: asdict(found) for engine, found in {**measurements(bundle, cache), **measured}.items()}
    cache.write("measurements", _file(bundle), json.dumps({"machine": machine(), "engines": engines}).encode())


def machine() -> dict[str, Any]:
    """All that makes a measurement worthless when it changes: processor, threads and the engines' versions."""
    return {"processor": processor(), "threads": available_threads(), "engines": versions()}


def _file(bundle: Bundle) -> str:
    return f"{bundle.hash}.json"


def _measured(bundle: Bundle, engine: str, record: dict[str, Any]) -> Measured:
    """The measurement; raises BundleError, KeyError, TypeError or ValueError where it is none of this bundle's variants."""
    precision = {graph: bundle.variant(graph, engine, record["precision"][graph]).precision for graph in bundle.graphs}
    if type(record["seconds"]) is not float:
        raise TypeError("seconds must be a number")
    return Measured(precision, record["seconds"])
