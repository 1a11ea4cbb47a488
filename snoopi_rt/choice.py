"""Which engine `auto` means on this machine: the fastest that was measured, else the first that is installed."""

import json

from snoopi_rt.bundle import Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.engines import check_engine, installed
from snoopi_rt.engines.base import BundleError

ORDER = ("cpu", "openvino")


def choose_engine(bundle: Bundle, cache: Cache) -> str:
    """The engine; raises EngineMissing where none is installed and BundleError where the bundle serves none that is."""
    here = set(installed()) & set(bundle.engines())
    measured = {name: seconds for name, seconds in measurements(bundle, cache).items() if name in here}
    return min(measured, key=lambda name: measured[name]) if measured else usable(bundle)[0]


def usable(bundle: Bundle) -> list[str]:
    """The installed engines that the bundle serves, of those that work on every machine; raises as `choose_engine` does."""
    here = [name for name in ORDER if name in installed()]
    if not here:
        check_engine(ORDER[0])
    candidates = [name for name in here if name in bundle.engines()]
    if not candidates:
        raise BundleError(f"bundle {bundle.name!r} serves {', '.join(bundle.engines()) or 'no engine'}, installed are {', '.join(here)}")
    return candidates


def measurements(bundle: Bundle, cache: Cache) -> dict[str, float]:
    """The seconds an image took on each engine that was measured here with this bundle; what cannot be read was not measured."""
    try:
        found = json.loads(cache.read("measurements", f"{bundle.hash}.json") or b"{}")
    except ValueError:
        return {}
    return {name: seconds for name, seconds in found.items() if type(seconds) is float} if isinstance(found, dict) else {}


def remember(bundle: Bundle, cache: Cache, seconds: dict[str, float]) -> None:
    """Keeps measurements beside those of other engines."""
    cache.write("measurements", f"{bundle.hash}.json", json.dumps({**measurements(bundle, cache), **seconds}).encode())
