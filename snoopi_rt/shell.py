"""What is printed: quoting and escaping of untrusted text (prompts, paths, metadata) for shells and terminals, and sizes."""

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
    """One word that bash, zsh and ksh read back as the same text, without control or unprintable characters."""
    text = str(text)
    if _PLAIN.fullmatch(text):
        return text
    if all(map(_is_printable, text)):
        return "'" + text.replace("'", "'\"'\"'") + "'"
    return f"$'{''.join(map(_escaped, text))}'"


def join(words: Iterable[str | Path]) -> str:
    """The words as a command line."""
    return " ".join(map(quote, words))


def visible(line: str) -> str:
    """The text with control and unprintable characters escaped as a shell reads them back, such as `$'\\033'`."""
    parts = ((shown, "".join(part)) for shown, part in groupby(line, _is_printable))
    return "".join(part if shown else f"$'{''.join(map(_escaped, part))}'" for shown, part in parts)


def size_text(count: int) -> str:
    """A number of bytes to read."""
    unit, name = next((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= unit or name == "kB")
    return f"{count / unit:.{0 if name == 'kB' else 1}f} {name}"


def json_line(value: Any) -> str:
    """The value as one line of JSON in printable ASCII."""
    return json.dumps(value).replace("\x7f", "\\u007f")  # the one control character that json leaves


def _is_printable(char: str) -> bool:
    """Whether it is printable, not a control or direction character, and in the encoding of standard output."""
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
    if _is_printable(char) and char != "!":  # an interactive bash looks ! up in its history
        return char
    byte_of_a_path = "\udc80" <= char <= "\udcff"
    return "".join(f"\\{byte:03o}" for byte in char.encode("utf-8", "surrogateescape" if byte_of_a_path else "surrogatepass"))
