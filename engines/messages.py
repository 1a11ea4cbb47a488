"""Why a package failed, from its messages: one line, without the source locations that precede it in an engine's."""

import re
from collections.abc import Iterable

MAX_LENGTH = 300
"""Characters of a reason: a name in a graph may have millions."""
_FILE = r"\S+\.(?:cc?|cpp|cu|hp{0,2}):\d+"
_PLACE = re.compile(
    rf"""\[ONNXRuntimeError\]\ :\ \d+\ :\ \w+\ :\ (?:Load\ model\ from\ .*?\ failed:)?
    | Exception\ from\ {_FILE}:?
    | Check\ '.*?'\ failed\ at\ {_FILE}:?
    | FrontEnd\ API\ failed\ with\ \w+:
    | (?:ERROR:\ )?{_FILE}:?(?:\ [^()'"]*::~?\w+\([^()]*\)(?:\ const)?(?:\ \[with\ [^]]*\])?|\ (?:[A-Z][a-z0-9]+){{2,}}(?=\ ))?""",
    re.VERBOSE,
)
_HEADING = re.compile(r"Loading input model|Model wasn't fully converted.*|--- .* ---|Node name:.*|.*:")
"""Lines that only introduce the next one."""


def why(error: BaseException) -> str:
    """Why a package failed, in one line."""
    if isinstance(error, UnicodeDecodeError):  # its object is the message, with a damaged name in it
        text = error.object.decode(errors="replace")
        return first_reason([text]) if _PLACE.search(text) else f"{text[:MAX_LENGTH]!r} is not UTF-8 text"
    return first_reason([str(error)]) or type(error).__name__


def first_reason(messages: Iterable[str]) -> str:
    """The first line that gives a reason; "" if none does."""
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    shorter = (" ".join(_PLACE.sub("", line).split()).removeprefix("-- ") for line in lines)
    line = next((line for line in shorter if line and not _HEADING.fullmatch(line)), lines[0] if lines else "")
    return line if len(line) <= MAX_LENGTH else f"{line[:MAX_LENGTH]}..."
