"""One-step text-to-image with negative prompts, without torch: `snoopi_rt.load().generate("a red fox")`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snoopi_rt.bundle.bundle import Bundle
    from snoopi_rt.errors import BundleError, Cancelled, EngineError, EngineMissing, InputError, OutputError, PackageMissing, SnoopiError
    from snoopi_rt.loading import load
    from snoopi_rt.pipeline import Pipeline
    from snoopi_rt.prompt_encoder import Conditioning
    from snoopi_rt.request import Request
    from snoopi_rt.result import Result

__version__ = "0.1.0"

# Found when first asked for, so that `import snoopi_rt` and `snoopi-rt --help` do not wait for numpy.
_HOMES = {
    "Bundle": "snoopi_rt.bundle.bundle",
    "BundleError": "snoopi_rt.errors",
    "Cancelled": "snoopi_rt.errors",
    "Conditioning": "snoopi_rt.prompt_encoder",
    "EngineError": "snoopi_rt.errors",
    "EngineMissing": "snoopi_rt.errors",
    "InputError": "snoopi_rt.errors",
    "OutputError": "snoopi_rt.errors",
    "PackageMissing": "snoopi_rt.errors",
    "Pipeline": "snoopi_rt.pipeline",
    "Request": "snoopi_rt.request",
    "Result": "snoopi_rt.result",
    "SnoopiError": "snoopi_rt.errors",
    "load": "snoopi_rt.loading",
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
    "PackageMissing",
    "Pipeline",
    "Request",
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
