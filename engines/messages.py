"""Why an engine failed, out of what its package says: one line, without the places in the package's source code that stand before it."""

import re
from collections.abc import Iterable

LONGEST = 300
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
"""Lines that only introduce what follows."""


def why(error: BaseException) -> str:
    """Why a package failed, in one line."""
    if isinstance(error, UnicodeDecodeError):  # what it says has the damaged name of something in it
        text = error.object.decode(errors="replace")
        return reason([text]) if _PLACE.search(text) else f"{text[:LONGEST]!r} is not UTF-8 text"
    return reason([str(error)]) or type(error).__name__


def reason(messages: Iterable[str]) -> str:
    """The first line that holds a reason; "" where none says anything."""
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    shorter = (" ".join(_PLACE.sub("", line).split()).removeprefix("-- ") for line in lines)
    line = next((line for line in shorter if line and not _HEADING.fullmatch(line)), lines[0] if lines else "")
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."
