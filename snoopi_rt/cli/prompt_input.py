"""The prompt when the command line has none: from the terminal, a pipe, or the bundle's examples."""

import sys
from typing import TYPE_CHECKING

import click

from snoopi_rt.cli.options import progress_line
from snoopi_rt.errors import InputError

if TYPE_CHECKING:
    from snoopi_rt.bundle.bundle import Bundle

MAX_BYTES = 2**20
"""Bytes that are read for one prompt."""


def read_prompt(word: str | None) -> str | None:
    """`word`; if that is "-" or None, standard input, all lines as one prompt. None if that is empty; a terminal is prompted for it.

    Raises InputError for input that cannot be read or is not text.
    """
    if word not in (None, "-"):
        return word
    if sys.stdin is None or sys.stdin.closed:
        return None
    if word is None and sys.stdin.isatty():
        click.echo("What to draw (Enter alone: an example): ", nl=False, err=True)
        data = sys.stdin.readline().encode("utf-8", "surrogateescape")
    else:
        data = _read_all()
    if len(data) > MAX_BYTES:
        raise InputError(f"standard input is too long for a prompt: more than {MAX_BYTES} bytes")
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError("standard input is not UTF-8 text") from error
    return " ".join(line.strip() for line in lines if line.strip()) or None


def example(bundle: "Bundle", seed: int) -> str:
    """One of the bundle's example prompts; the same seed always gives the same one. Raises InputError if it has none."""
    examples = bundle.examples or (bundle.prompts.texts if bundle.prompts else ())
    if not examples:
        raise InputError(f"give a PROMPT: bundle {bundle.name!r} has no example prompts")
    return examples[seed % len(examples)]


def _read_all() -> bytes:
    with progress_line("waiting for a prompt on standard input"):
        try:
            return sys.stdin.buffer.read(MAX_BYTES + 1)
        except OSError as error:
            raise InputError(f"cannot read standard input: {error.strerror}") from error
