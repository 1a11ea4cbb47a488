"""One-step text-to-image with negative prompts, without torch: `snoopi_rt.load().generate("a red fox")`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snoopi_rt.bundle import Bundle
    from snoopi_rt.engines.base import BundleError, Cancelled, EngineError, EngineMissing, InputError, OutputError, SnoopiError
    from snoopi_rt.pipeline import Pipeline, Result, load
    from snoopi_rt.prompts import Conditioning

__version__ = "0.1.0"

# Found when first asked for, so that `import snoopi_rt` and `snoopi-rt --help` do not wait for numpy.
_HOMES = {
    "Bundle": "snoopi_rt.bundle",
    "BundleError": "snoopi_rt.engines.base",
    "Cancelled": "snoopi_rt.engines.base",
    "Conditioning": "snoopi_rt.prompts",
    "EngineError": "snoopi_rt.engines.base",
    "EngineMissing": "snoopi_rt.engines.base",
    "InputError": "snoopi_rt.engines.base",
    "OutputError": "snoopi_rt.engines.base",
    "Pipeline": "snoopi_rt.pipeline",
    "Result": "snoopi_rt.pipeline",
    "SnoopiError": "snoopi_rt.engines.base",
    "load": "snoopi_rt.pipeline",
}

__all__ = [
    "Bundle",
    "BundleError",
    "Cancelled",
    "Conditioning",
    "EngineError",
    "EngineMissing",
    "InputError",
    "OutputError",
    "Pipeline",
    "Result",
    "SnoopiError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'snoopi_rt' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
