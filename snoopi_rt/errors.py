"""The errors of the whole project. Every part may import them.

SnoopiError
├── EngineError         an engine cannot load or run a model
│   └── EngineMissing   ... because its package is not installed (also ImportError)
├── BundleError         a bundle is not what its bundle.json promises
├── InputError          the caller asked for something impossible (also ValueError)
├── Cancelled           the deadline has passed, or the caller no longer waits
└── OutputError         a result is unusable (NaN) or cannot be written
"""

LONGEST_LINE = 1000
"""Characters of an error."""


def one_line(text: str) -> str:
    """The text in one line, without its middle where that is long: names out of anybody's files and requests stand in errors."""
    line = " ".join(part for part in map(str.strip, text.splitlines()) if part)
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE * 2 // 3]} ... {line[-LONGEST_LINE // 4 :]}"


class SnoopiError(Exception):
    """A known error: one line that says what was asked, what is wrong and what to do."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class EngineError(SnoopiError):
    """An engine cannot load or run a model."""


class EngineMissing(EngineError, ImportError):
    """The package of an engine is not installed."""


class BundleError(SnoopiError):
    """A bundle is not what its bundle.json promises."""


class InputError(SnoopiError, ValueError):
    """The caller asked for something that cannot be."""


class Cancelled(SnoopiError):
    """The caller's time is over, or the caller waits no more."""


class OutputError(SnoopiError):
    """What came out cannot be used or cannot be written."""


def how_to_install(extra: str = "") -> str:
    """The command that installs snoopi-rt with an extra, for errors: from a clone, as long as the name is not on PyPI."""
    package = f'".[{extra}]"' if extra else "."
    return f"pip install {package} in the clone of snoopi-rt"
