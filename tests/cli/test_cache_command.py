"""`snoopi-rt cache`: what is kept, what is cleared, and why nothing is."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import run

from snoopi_rt import cache
from snoopi_rt.cache import Cache
from snoopi_rt.cli.main import main


def test_cache_says_what_is_kept_and_clears_it(cache_folder: Path) -> None:
    Cache().write("states", "a.npy", bytes(3_000_000))
    said = run("cache").stdout
    assert str(cache_folder) in said
    assert "3.0 MB" in said
    assert "add --yes" in run("cache", "--clear", code=2).stderr
    refused = CliRunner().invoke(main, ["cache", "--clear"], input="n\n")
    assert refused.exit_code == 1 and "Remove 3.0 MB from" in refused.stderr
    assert Cache().sizes()["states"] == 3_000_000
    assert CliRunner().invoke(main, ["cache", "--clear"], input="y\n").stdout.startswith("removed 3.0 MB\n")
    assert Cache().sizes()["states"] == 0
    assert run("cache", "--clear", "--yes").stdout.startswith("removed 0 kB\n")
    assert "--yes goes with --clear" in run("cache", "--yes", code=2).stderr


def test_a_cache_that_cannot_be_cleared_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    Cache().write("states", "a.npy", bytes(3_000_000))
    monkeypatch.setattr(cache, "_remove", lambda path: None)  # as on a disk that is read-only
    told = run("cache", "--clear", "--yes", code=1)
    assert told.stdout == "removed 0 kB\n" and told.stderr.startswith("error: 3.0 MB could not be removed from ")


def test_cache_says_why_it_cannot_be_used(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "file").write_bytes(b"")
    monkeypatch.setenv("SNOOPI_RT_CACHE", "file")
    assert "nothing is cached: it cannot be created: Not a directory" in run("cache").stdout
