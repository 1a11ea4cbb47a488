"""The cache keeps bytes in one private folder, and does without where it cannot."""

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
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
    with cache.fill("model", 1) as folder:
        assert folder is None
    assert cache.find("model") is None
    cache.drop("model")
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
    assert Cache().problem() == "it belongs to another user, or other users can write to it"
    (tmp_path / "file").write_bytes(b"")
    assert Cache(tmp_path / "file" / "cache").problem() == "it cannot be created: Not a directory"


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


def fill(cache: Cache, name: str, size: int, files: int = 2) -> Path:
    with cache.fill(name, size) as folder:
        assert folder is not None
        for number in range(files):
            (folder / f"part{number}").write_bytes(bytes(size // files))
    return cache.path / "engines" / name


def test_a_folder_is_found_once_it_is_whole() -> None:
    cache = Cache()
    with cache.fill("model", 10) as folder:
        assert folder is not None
        (folder / "weights").write_bytes(b"w" * 10)
        assert cache.find("model") is None
    found = cache.find("model")
    assert found is not None
    assert (found / "weights").read_bytes() == b"w" * 10
    assert stat.S_IMODE(found.stat().st_mode) == 0o700
    cache.drop("model")
    assert cache.find("model") is None
    assert list((cache.path / "engines").iterdir()) == []


def test_a_folder_whose_making_failed_leaves_nothing() -> None:
    with pytest.raises(ZeroDivisionError), Cache().fill("model", 10) as folder:
        assert folder is not None
        (folder / "weights").write_bytes(b"half")
        raise ZeroDivisionError
    assert list((Cache().path / "engines").iterdir()) == []


def test_a_folder_that_changed_is_removed() -> None:
    path = fill(Cache(), "model", 10)
    (path / "part1").write_bytes(b"other")
    assert Cache().find("model") is None
    assert not path.exists()


def test_a_folder_goes_as_a_whole_and_the_one_used_last_stays() -> None:
    cache = Cache(limit=1000)
    for age, name in enumerate(("new", "middle", "old")):
        os.utime(fill(cache, name, 300), (1000 - age, 1000 - age))
    assert cache.find("old") is not None
    fill(cache, "newest", 300)
    assert {path.name for path in (cache.path / "engines").iterdir()} == {"new", "old", "newest"}
    assert cache.find("old") is not None
    assert cache.sizes()["engines"] <= 1000


def test_folders_and_files_share_one_limit() -> None:
    cache = Cache(limit=1000)
    os.utime(fill(cache, "model", 400), (1000, 1000))
    cache.write("states", "a", bytes(800))
    cache.trim()
    assert cache.find("model") is None
    assert cache.read("states", "a") is not None


def test_a_folder_takes_at_most_half_the_limit_and_one_that_turned_out_larger_is_not_tried_again() -> None:
    cache = Cache(limit=1000)
    kept = fill(cache, "small", 300)
    with cache.fill("large", 501) as folder:
        assert folder is None
    with cache.fill("larger than expected", 100) as folder:
        assert folder is not None
        (folder / "weights").write_bytes(bytes(600))
    assert cache.find("larger than expected") is None
    with cache.fill("larger than expected", 100) as folder:
        assert folder is None
    assert cache.find("small") == kept
    assert cache.sizes()["engines"] < 500


def test_a_disk_without_room_is_not_filled() -> None:
    cache = Cache(limit=2**62)
    cache.write("states", "a", b"")
    with cache.fill("model", shutil.disk_usage(cache.path).free) as folder:
        assert folder is None


def test_clear_removes_folders_and_what_a_crash_left_of_them() -> None:
    cache = Cache()
    fill(cache, "model", 10)
    (cache.path / "engines" / ".model.abc.tmp").mkdir()
    (cache.path / "engines" / ".model.abc.tmp" / "half").write_bytes(b"half")
    assert cache.sizes()["engines"] > 10
    cache.clear()
    assert list((cache.path / "engines").iterdir()) == []


def test_processes_share_folders() -> None:
    """Some fill one name, some drop it: whoever finds it finds all of it."""
    code = """
import sys
from snoopi_rt.cache import Cache
cache, letter = Cache(), sys.argv[1].encode()
for _ in range(100):
    with cache.fill("model", 2000) as folder:
        for part in "ab":
            (folder / part).write_bytes(letter * 1000)
    found = cache.find("model")
    try:
        sizes = {len((found / part).read_bytes()) for part in "ab"} if found else {1000}
    except FileNotFoundError:  # dropped by another in between
        sizes = {1000}
    assert sizes == {1000}
    cache.drop("model")
"""
    running = [subprocess.Popen([sys.executable, "-c", code, letter]) for letter in "xyz"]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert [path for path in (Cache().path / "engines").iterdir() if path.name != "model"] == []


def test_what_lies_under_another_name_or_kind_was_not_written(kept: Path) -> None:
    for kind in ("states", "hashes"):
        Cache().write(kind, "a", b"bytes")
    shutil.copy(kept / "states" / "a", kept / "states" / "b")
    shutil.copy(kept / "states" / "a", kept / "hashes" / "a")
    assert (Cache().read("states", "b"), Cache().read("hashes", "a"), Cache().read("states", "a")) == (None, None, b"bytes")


def test_a_time_in_the_future_keeps_nothing_for_ever(kept: Path) -> None:
    cache, now = Cache(limit=15), time.time()
    for name, used in (("future", now + 10**8), ("used", now)):
        cache.write("states", name, bytes(10))
        os.utime(kept / "states" / name, (used, used))
    cache.trim()
    assert [path.name for path in (kept / "states").iterdir()] == ["used"]


def test_a_folder_that_is_being_filled_is_not_trimmed_and_one_that_a_crash_left_is_even_where_there_is_room() -> None:
    cache = Cache()
    with cache.fill("model", 10) as folder:
        assert folder is not None
        (folder / "weights").write_bytes(bytes(2000))
        os.utime(folder, (1000, 1000))
        cache.trim()
        assert (folder / "weights").exists()
        os.utime(folder / "weights", (1000, 1000))
        os.utime(folder, (1000, 1000))
        cache.trim()
        assert not folder.exists()


def test_scratch_that_a_killed_process_left_and_locks_are_removed() -> None:
    cache = Cache()
    with cache.scratch() as folder:
        model = folder / "engines" / "model"
        model.mkdir(parents=True)
        (model / "weights").write_bytes(bytes(2000))
        os.utime(folder, (1000, 1000))
        cache.trim()
        assert cache.sizes()["scratch"] == 2000, "it is written to"
        os.utime(model / "weights", (1000, 1000))
        cache.trim()
        assert not folder.exists()
    with cache.scratch() as folder:
        cache.clear()
        assert not folder.exists()
    with cache.alone("model"):
        pass
    cache.clear()
    assert list((cache.path / "locks").iterdir()) == []


def test_trimming_holds_no_more_entries_in_memory_than_it_removes(kept: Path) -> None:
    cache = Cache()
    for number in range(2000):
        cache.write("states", f"{number}", b"bytes")
        os.utime(kept / "states" / f"{number}", (number, number))
    full = sum(cache.sizes().values())

    def peak(limit: int) -> int:
        # In a process of its own: threads of other tests allocate here.
        script = (
            "import sys, tracemalloc; from snoopi_rt.cache import Cache; cache = Cache(limit=int(sys.argv[1])); tracemalloc.start(); "
            "cache.trim(); print(tracemalloc.get_traced_memory()[1])"
        )
        return int(subprocess.run([sys.executable, "-c", script, str(limit)], capture_output=True, text=True, check=True).stdout)

    none, few = peak(full), peak(full - 12)
    names = {int(path.name) for path in (kept / "states").iterdir()}
    assert names == set(range(3, 2000)), "three of five bytes, the least recently used"
    assert max(none, few) < peak(0) / 2, "that of all entries, which are removed"


def test_a_write_does_not_wait_for_the_cache_to_be_trimmed(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, over = threading.Event(), threading.Event()
    monkeypatch.setattr(Cache, "trim", lambda cache: (begun.set(), over.wait(60)))
    Cache().write("states", "a", b"bytes")
    assert not begun.wait(0.1), "a new cache has nothing to remove"
    os.utime(kept, (1000, 1000))
    cache = Cache()
    for name in map(str, range(600)):
        cache.write("states", name, b"bytes")
    assert begun.wait(60) and cache.read("states", "599") == b"bytes"
    over.set()


def test_a_small_compiled_file_is_known_by_its_contents() -> None:
    cache = Cache()
    path = fill(cache, "model", 1000)
    data = bytearray((path / "part0").read_bytes())
    stamps = json.loads((path / "files.json").read_bytes())
    data[500 - 1] ^= 1
    (path / "part0").write_bytes(data)
    status = (path / "part0").stat()
    stamps["part0"][:3] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]  # as a disk that loses bits leaves them
    (path / "files.json").write_text(json.dumps(stamps))
    assert cache.find("model") is None
