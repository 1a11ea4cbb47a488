"""The one cache folder: verified hashes, prompt states, measurements, compiled models, and scratch folders for large files.

It knows nothing about its contents. An unusable cache stores nothing, silently: every reader works without it.
"""

import contextlib
import hashlib
import heapq
import json
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from snoopi_rt.files import sha256, temporary_beside, write_whole

LIMIT = 10 * 2**30
KINDS = ("bundles", "engines", "hashes", "locks", "measurements", "scratch", "states")
NOWHERE = Path(os.devnull) / "snoopi-rt"
"""A folder that cannot exist, for a user without a home."""
DIGEST = 32
"""Bytes of the digest after each entry: of its kind, its name and its data."""
WRITES_PER_TRIM = 256
RECENT = 3600.0
"""Seconds within which another process may have trimmed the cache, or may still be filling a folder."""
FILES = "files.json"
"""In a folder of compiled files: their sizes, times and digests, written last. A folder that does not match is damaged."""
MAX_HASHED = 64 * 2**20
"""Bytes up to which a folder of compiled files is hashed at every start; larger ones, which are mapped, are checked by size and times."""
FREE_FACTOR = 2
"""A folder is filled only if this many times its expected size is free on the disk."""


class Cache:
    """Bytes by kind and file name, and folders of compiled files by name; at most `limit` bytes, evicted least recently used first.

    Safe to share between threads and processes.
    """

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.path = default_folder() if folder is None else folder
        self.limit = limit
        self._writes = 0
        self._trimming = threading.Lock()

    def read(self, kind: str, name: str) -> bytes | None:
        """What was written under that name, or None; a damaged entry counts as missing."""
        if not self._private():
            return None
        path = self.path / kind / name
        try:
            entry = path.read_bytes()
        except OSError:
            return None
        data, digest = entry[:-DIGEST], entry[-DIGEST:]
        if digest != _digest(kind, name, data):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return data

    def write(self, kind: str, name: str, data: bytes) -> None:
        """Stores the bytes, if possible."""
        folder = self._folder(kind)
        if folder is None:
            return
        with contextlib.suppress(OSError):
            write_whole(folder / name, data + _digest(kind, name, data))
        # Trimming 200,000 files takes seconds, so it runs in the background; the first write of a process may be its only one.
        if (self._writes or not self._was_trimmed_recently()) and self._writes % WRITES_PER_TRIM == 0:
            threading.Thread(target=self._trim_once, daemon=True).start()
        self._writes += 1

    def find(self, name: str) -> Path | None:
        """The folder of compiled files of that name, or None; a damaged one is removed."""
        folder = self.path / "engines" / name
        if not self._private() or not folder.is_dir():
            return None
        try:
            whole = json.loads((folder / FILES).read_bytes()) == _contents(folder)
        except (OSError, ValueError, RecursionError):
            whole = False
        if not whole:
            self.drop(name)
            return None
        with contextlib.suppress(OSError):
            os.utime(folder)
        return folder

    @contextlib.contextmanager
    def fill(self, name: str, size: int) -> Iterator[Path | None]:
        """A new folder for about `size` bytes of compiled files, which `find` returns once the block has ended without an error.

        None if there is no usable cache or not enough space. A folder may use at most half the limit, because two that are needed
        together would otherwise evict each other at every start; one that turns out larger is discarded, and not tried again.
        """
        folder, new = self._folder("engines"), None
        with contextlib.suppress(OSError):
            if folder is not None and self._fits(folder, name, size):
                new = Path(tempfile.mkdtemp(dir=folder, prefix=f".{name[:16]}.", suffix=".tmp"))
        try:
            yield new
            if new is not None:
                self._publish(new, new.with_name(name))
        finally:
            if new is not None:
                shutil.rmtree(new, ignore_errors=True)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder for the block's own large files, since the system's temporary folder may be in memory; that one is taken if
        there is no usable cache.

        What a killed process leaves is removed by `trim`, an hour after anything was last written to it.
        """
        with tempfile.TemporaryDirectory(dir=self._folder("scratch"), prefix=".", suffix=".tmp") as folder:
            yield Path(folder)

    def drop(self, name: str) -> None:
        """Removes the compiled files of that name."""
        folder = self.path / "engines" / name
        if self._private() and folder.is_dir():
            _remove(folder)

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """A lock per name across threads and processes; without a usable cache it does nothing."""
        from filelock import FileLock

        folder = self._folder("locks")
        with contextlib.nullcontext() if folder is None else FileLock(folder / f"{name[:32]}.lock"):
            yield

    def problem(self) -> str | None:
        """Why nothing can be stored in the folder, which is created if missing; None if it can."""
        if self.path == NOWHERE:
            return "the user has no home folder: set $SNOOPI_RT_CACHE to a folder"
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
        except OSError as error:
            return f"it cannot be created: {error.strerror}"
        if not self._private():
            return "it belongs to another user, or other users can write to it"
        return None if os.access(self.path, os.W_OK) else "no permission to write to it"

    def sizes(self) -> dict[str, int]:
        """The bytes on disk of each kind."""
        return {kind: sum(size for _, size, _ in self._entries(kind)) for kind in KINDS}

    def trim(self) -> None:
        """Removes the least recently used files and folders until the rest is within the limit, and what killed processes left behind.

        A folder that is being filled stays: something was written to it recently, which only a killed process stops doing. That needs no
        lock, which would itself have to survive a kill. A time in the future counts as never used.
        """
        now = time.time()
        with contextlib.suppress(OSError):
            os.utime(self.path)  # tells other processes when it was last trimmed
        excess = -self.limit
        for used, size, path in self._all_entries():
            if not path.name.startswith("."):
                excess += size
            elif abs(used - now) > RECENT:
                _remove(path)
        if excess <= 0:
            return
        # Only as many as must go are held, the most recent of them on top: a process never gives the memory of 200,000 entries back.
        oldest: list[tuple[float, int, Path]] = []
        for used, size, path in self._all_entries():
            if not path.name.startswith("."):
                heapq.heappush(oldest, (-used if used <= now + RECENT else 0.0, size, path))
                excess -= size
                while oldest and excess + oldest[0][1] <= 0:
                    excess += heapq.heappop(oldest)[1]
        for _, _, path in sorted(oldest, reverse=True):
            _remove(path)

    def _was_trimmed_recently(self) -> bool:
        try:
            return abs(time.time() - self.path.stat().st_mtime) < RECENT
        except OSError:
            return False

    def _trim_once(self) -> None:
        if self._trimming.acquire(blocking=False):
            try:
                self.trim()
            finally:
                self._trimming.release()

    def clear(self) -> None:
        """Removes all entries; other files in the folder stay, and so does everything if other users can write to it."""
        for kind in KINDS:
            for _, _, path in self._entries(kind):
                _remove(path)

    def _folder(self, kind: str) -> Path | None:
        """The folder of one kind, created if missing, or None if there is no usable cache."""
        folder = self.path / kind
        if self.problem() is not None:
            return None
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError:
            return None
        return folder

    def _fits(self, folder: Path, name: str, size: int) -> bool:
        was_too_large = (folder / name).is_file()
        return not was_too_large and size <= self.limit // 2 and shutil.disk_usage(folder).free > FREE_FACTOR * size

    def _publish(self, new: Path, folder: Path) -> None:
        with contextlib.suppress(OSError):
            contents = _contents(new)
            if sum(status.st_size for status in _files(new).values()) > self.limit // 2:
                write_whole(folder, b"too large")
                return
            write_whole(new / FILES, json.dumps(contents).encode())
            new.rename(folder)
        self.trim()

    def _all_entries(self) -> Iterator[tuple[float, int, Path]]:
        return (entry for kind in KINDS for entry in self._entries(kind))

    def _entries(self, kind: str) -> Iterator[tuple[float, int, Path]]:
        """The time of last use, the bytes and the path of each file and folder of one kind."""
        if not self._private():
            return
        with contextlib.suppress(OSError), os.scandir(self.path / kind) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    status, path = entry.stat(follow_symlinks=False), Path(entry.path)
                    folder = entry.is_dir(follow_symlinks=False)
                    if folder:
                        files = _files(path).values()
                        used = max([status.st_mtime, *(file.st_mtime for file in files)] if entry.name[0] == "." else [status.st_mtime])
                        yield used, sum(file.st_size for file in files), path
                    else:
                        yield status.st_mtime, max(0, status.st_size - DIGEST), path

    def _private(self) -> bool:
        """Whether no other user can plant a file here: the hashes in it are trusted."""
        if os.name == "nt":
            return True
        try:
            status = self.path.stat()
        except OSError:
            return False
        return status.st_uid == os.getuid() and not stat.S_IMODE(status.st_mode) & 0o022


def _digest(kind: str, name: str, data: bytes) -> bytes:
    return hashlib.sha256(f"{kind}/{name}\n".encode() + data).digest()


def _files(folder: Path) -> dict[str, os.stat_result]:
    """The status of each file but FILES, by its path inside the folder."""
    paths = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
    return {path.relative_to(folder).as_posix(): path.lstat() for path in paths if path.name != FILES}


def _contents(folder: Path) -> dict[str, list[int | str]]:
    """The size and times of each file but FILES, and its digest if they are small: a start must not read gigabytes that are mapped next."""
    files = _files(folder)
    small = sum(status.st_size for status in files.values()) <= MAX_HASHED
    return {
        name: [status.st_size, status.st_mtime_ns, status.st_ctime_ns, sha256(folder / name) if small else ""]
        for name, status in files.items()
    }


def _remove(path: Path) -> None:
    """Removes a file, or a folder atomically: readers see all of it or nothing."""
    with contextlib.suppress(OSError):
        if not path.is_dir() or path.is_symlink():
            path.unlink()
            return
        removed = temporary_beside(path)
        path.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def default_folder() -> Path:
    """A folder of our own, because it is trimmed and cleared: in $SNOOPI_RT_CACHE, or in the user's cache folder.

    NOWHERE for a user who has neither.
    """
    if folder := os.environ.get("SNOOPI_RT_CACHE"):
        return Path(folder) / "snoopi-rt-cache"
    from platformdirs import user_cache_path

    if os.environ.get("HOME") == "" and not os.environ.get("XDG_CACHE_HOME"):  # it would be in the root
        return NOWHERE
    try:
        path = user_cache_path("snoopi-rt", appauthor=False)
    except RuntimeError:  # no $HOME, and the system does not know the user; older platformdirs then return a path that starts with ~
        return NOWHERE
    return path if path.is_absolute() else NOWHERE
