"""The errors of the whole project. Every package may import them.

SnoopiError
├── EngineError         an engine cannot load or run a model
│   └── EngineMissing   ... because its package is not installed (also PackageMissing)
├── PackageMissing      a package that an extra installs is missing or does not import (also ImportError)
├── BundleError         a bundle is not what its bundle.json promises
│   └── BundleMissing   ... because no folder has the path (also InputError)
├── InputError          the caller's input is invalid (also ValueError)
├── Cancelled           the deadline has passed, or the caller no longer waits
└── OutputError         a result is unusable (NaN) or cannot be written
"""

MAX_LINE = 1000
"""Characters of an error."""


def one_line(text: str) -> str:
    """The text in one line, shortened in the middle if it is long: errors contain names from untrusted files and requests."""
    line = " ".join(part for part in map(str.strip, text.splitlines()) if part)
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE * 2 // 3]} ... {line[-MAX_LINE // 4 :]}"


class SnoopiError(Exception):
    """A known error: one line with the input, what is wrong with it, and what to do."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class EngineError(SnoopiError):
    """An engine cannot load or run a model."""


class PackageMissing(SnoopiError, ImportError):
    """A package that an extra installs is missing or does not import."""


class EngineMissing(EngineError, PackageMissing):
    """The package of an engine is not installed."""


class BundleError(SnoopiError):
    """A bundle is not what its bundle.json promises."""


class InputError(SnoopiError, ValueError):
    """The caller's input is invalid."""


class BundleMissing(BundleError, InputError):
    """There is no folder at the path that was asked for."""


class Cancelled(SnoopiError):
    """The deadline has passed, or the caller no longer waits."""


class OutputError(SnoopiError):
    """A result is unusable or cannot be written."""


def how_to_install(extra: str = "") -> str:
    """The command that installs snoopi-rt with an extra, for errors: in a clone, because snoopi-rt is not on PyPI."""
    package = f'".[{extra}]"' if extra else "."
    return f"pip install {package} in the clone of snoopi-rt"


def how_to_find_node(graph: str, engine: str) -> str:
    """The command that names the node at which a graph goes wrong on an engine, for errors. BUNDLE: a server shows nobody its folders."""
    other = "openvino" if engine == "cpu" else "cpu"
    return f"snoopi-rt compare BUNDLE --engine {other} --engine {engine} --graph {graph} --layers names the node"
