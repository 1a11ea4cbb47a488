"""The cache keeps bytes in one private folder, and does without where it cannot."""

import os
import stat
import sys
import threading
from pathlib import Path

import pytest

from snoopi_rt.cache import Cache


@pytest.fixture
def kept(cache_folder: Path) -> Path:
    """Where the cache that $SNOOPI_RT_CACHE names really is."""
    return cache_folder / "snoopi-rt-cache"


def test_what_was_written_is_read(kept: Path) -> None:
    assert Cache().read("states", "a.npy") is None
    Cache().write("states", "a.npy", b"bytes")
    assert Cache().read("states", "a.npy") == b"bytes"
    assert (kept / "states" / "a.npy").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="no such modes")
def test_only_the_user_can_look_inside(kept: Path) -> None:
    Cache().write("states", "a.npy", b"bytes")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700


@pytest.mark.skipif(sys.platform == "win32", reason="no such modes")
def test_a_folder_that_others_can_write_is_not_used(kept: Path) -> None:
    Cache().write("hashes", "a.json", b"[]")
    kept.chmod(0o777)
    assert Cache().read("hashes", "a.json") is None
    Cache().write("hashes", "b.json", b"[]")
    assert not (kept / "hashes" / "b.json").exists()


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = Cache(tmp_path / "file" / "cache")
    cache.write("states", "a.npy", b"bytes")
    cache.trim()
    cache.clear()
    assert cache.read("states", "a.npy") is None
    assert cache.folder("engines") is None
    assert sum(cache.sizes().values()) == 0


def test_the_oldest_goes_first(kept: Path) -> None:
    cache = Cache(limit=25)
    for age, name in enumerate(("new", "middle", "old")):
        cache.write("states", name, bytes(10))
        os.utime(kept / "states" / name, (1000 - age, 1000 - age))
    cache.trim()
    assert {path.name for path in (kept / "states").iterdir()} == {"new", "middle"}


def test_what_is_read_counts_as_new(kept: Path) -> None:
    cache = Cache(limit=15)
    for name in ("used", "unused"):
        cache.write("states", name, bytes(10))
        os.utime(kept / "states" / name, (1000, 1000))
    cache.read("states", "used")
    cache.trim()
    assert [path.name for path in (kept / "states").iterdir()] == ["used"]


def test_clear_removes_only_what_is_the_caches(kept: Path) -> None:
    cache = Cache()
    cache.write("states", "a.npy", b"bytes")
    (kept / "diary.txt").write_text("mine")
    cache.clear()
    assert sum(cache.sizes().values()) == 0
    assert (kept / "diary.txt").exists()


def test_a_folder_with_other_things_loses_nothing_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "base.py").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SNOOPI_RT_CACHE", ".")
    cache = Cache(limit=0)
    cache.write("states", "a.npy", b"bytes")
    cache.trim()
    cache.clear()
    assert sum(cache.sizes().values()) == 0
    assert (tmp_path / "engines" / "base.py").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="no such modes")
def test_clear_deletes_nothing_behind_a_link_that_others_could_plant(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    kept.mkdir(parents=True)
    (kept / "engines").symlink_to(tmp_path)
    kept.chmod(0o777)
    Cache().clear()
    assert (tmp_path / "diary.txt").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no such modes")
def test_a_folder_that_cannot_be_used_says_why(kept: Path, tmp_path: Path) -> None:
    assert Cache().problem() is None
    kept.chmod(0o777)
    assert Cache().problem() == "it belongs to another user, or others can write into it"
    (tmp_path / "file").write_bytes(b"")
    assert Cache(tmp_path / "file" / "cache").problem() == "it cannot be made: Not a directory"


def test_readers_never_see_half_a_file() -> None:
    cache, seen, done = Cache(), set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(cache.read("states", "a"))

    reader = threading.Thread(target=read)
    reader.start()
    for letter in (b"a", b"b") * 20:
        Cache().write("states", "a", letter * 100_000)
    done.set()
    reader.join()
    assert seen <= {None, b"a" * 100_000, b"b" * 100_000}
