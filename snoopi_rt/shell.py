"""Foreign text as a shell reads it and a terminal may show it: prompts, paths and metadata are printed through these."""

import json
import re
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

_PLAIN = re.compile(r"[\w@%+:,./-][\w@%+=:,./-]*", re.ASCII)  # zsh expands a word that begins with =
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\", "'": "\\'"}


def quote(text: str | Path) -> str:
    """One word that bash, zsh and ksh read back as the same text, and that holds nothing a terminal obeys or cannot show."""
    text = str(text)
    if _PLAIN.fullmatch(text):
        return text
    if all(map(_is_shown, text)):
        return "'" + text.replace("'", "'\"'\"'") + "'"
    return f"$'{''.join(map(_escaped, text))}'"


def join(words: Iterable[str | Path]) -> str:
    """The command line of these words."""
    return " ".join(map(quote, words))


def visible(line: str) -> str:
    """The text with whatever a terminal would obey or cannot show written as a shell reads it back: `$'\\033'`; the rest as it is."""
    parts = ((shown, "".join(part)) for shown, part in groupby(line, _is_shown))
    return "".join(part if shown else f"$'{''.join(map(_escaped, part))}'" for shown, part in parts)


def json_line(value: Any) -> str:
    """The value as one line of JSON in printable ASCII."""
    return json.dumps(value).replace("\x7f", "\\u007f")  # the one control character that json leaves


def _is_shown(char: str) -> bool:
    """Whether it is no control, direction or other invisible character, and standard output has it."""
    if not char.isprintable():
        return False
    try:
        char.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _escaped(char: str) -> str:
    if char in _NAMED:
        return _NAMED[char]
    if _is_shown(char) and char != "!":  # an interactive bash looks ! up in its history
        return char
    byte_of_a_path = "\udc80" <= char <= "\udcff"
    return "".join(f"\\{byte:03o}" for byte in char.encode("utf-8", "surrogateescape" if byte_of_a_path else "surrogatepass"))
