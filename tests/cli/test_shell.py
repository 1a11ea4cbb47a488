"""What is foreign is printed so that a terminal obeys nothing of it and a shell reads the same text back."""

import io
import subprocess
import sys

import pytest

from snoopi_rt.shell import join, quote, visible

TEXTS = [
    "a red fox",
    "it's",
    "",
    "-",
    "=ls",
    "~",
    "*.png",
    "$HOME `id` \\n !x",
    "\x1b[31mred\x1b[0m",
    "a\nb\t'c'\\ !d",
    "\x9b31m",
    "\x7f12",
    "\u202egpj.exe",
    "\u2028",
    "🦊 und „Füchse“",
    "\udcff\udcfe",
]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_shell_reads_the_same_words_back_and_a_terminal_obeys_none(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    line = join(TEXTS)
    assert line.isprintable() and line.encode(encoding)
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    assert done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1] == TEXTS


@pytest.mark.parametrize("text", TEXTS)
def test_a_line_is_made_visible_once(text: str) -> None:
    line = visible(f"error: {text} is there")
    assert line.isprintable() and visible(line) == line
    assert visible(quote(text)) == quote(text)
    assert line == f"error: {text} is there" or "$'" in line
