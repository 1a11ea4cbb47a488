"""Where the prompt comes from when the command line has none: the terminal, a pipe, or the bundle's own examples."""

import sys
from typing import TYPE_CHECKING

import click

from snoopi_rt.cli.options import progress_line
from snoopi_rt.errors import InputError

if TYPE_CHECKING:
    from snoopi_rt.bundle.bundle import Bundle

LARGEST = 2**20
"""Bytes that are read for one prompt."""


def read_prompt(word: str | None) -> str | None:
    """`word`; where it is "-" or None, what standard input says, all lines as one prompt, for which a terminal is asked; None: nothing.

    Raises InputError for what cannot be read and is no text.
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
    if len(data) > LARGEST:
        raise InputError(f"standard input has more than {LARGEST} bytes: too many for a prompt")
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError("standard input is not UTF-8 text") from error
    return " ".join(line.strip() for line in lines if line.strip()) or None


def example(bundle: "Bundle", seed: int) -> str:
    """One of the prompts that show the bundle, the same for the same seed. Raises InputError where it has none."""
    examples = bundle.examples or (bundle.prompts.texts if bundle.prompts else ())
    if not examples:
        raise InputError(f"give a PROMPT: bundle {bundle.name!r} has no example to draw")
    return examples[seed % len(examples)]


def _read_all() -> bytes:
    with progress_line("waiting for a prompt on standard input"):
        try:
            return sys.stdin.buffer.read(LARGEST + 1)
        except OSError as error:
            raise InputError(f"cannot read standard input: {error.strerror}") from error
