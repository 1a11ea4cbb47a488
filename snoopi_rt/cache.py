"""The one cache folder: hashes already verified, prompt states, measurements, compiled models.

Knows no meaning of what it keeps. A cache that cannot be used keeps nothing and says nothing: every reader can do without it.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from snoopi_rt.files import sha256, write_whole

LIMIT = 10 * 2**30
KINDS = ("bundles", "engines", "hashes", "measurements", "states")
NOWHERE = Path(os.devnull) / "snoopi-rt"
"""A folder that cannot be, for a user without a home."""
SEAL = 32
"""Bytes of the digest behind what is kept: of its kind, its name and itself."""
WRITES_PER_TRIM = 256
LATELY = 3600.0
"""Seconds in which another process may have trimmed the cache, or may still be filling a folder."""
FILES = "files.json"
"""In a folder of compiled files: their sizes, times and digests, written last. A file that differs is damaged."""
HASHED = 64 * 2**20
"""Bytes of a folder of compiled files up to which it is hashed at every start; larger ones, which are mapped, are known by their times."""
ROOM = 2
"""How many times its expected size must be free on the disk before a folder is filled: no cache is worth a full disk."""


class Cache:
    """Bytes by kind and file name, and folders of compiled files by name; at most `limit` bytes, what was not used for longest goes first.

    Threads and processes may share it.
    """

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.path = default_folder() if folder is None else folder
        self.limit = limit
        self._writes = 0
        self._trimming = threading.Lock()

    def read(self, kind: str, name: str) -> bytes | None:
        """What was written under that name, or None; what is not as it was written was not."""
        if not self._private():
            return None
        path = self.path / kind / name
        try:
            sealed = path.read_bytes()
        except OSError:
            return None
        data, seal = sealed[:-SEAL], sealed[-SEAL:]
        if seal != _seal(kind, name, data):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return data

    def write(self, kind: str, name: str, data: bytes) -> None:
        """Keeps the bytes, if that is possible."""
        folder = self._folder(kind)
        if folder is None:
            return
        with contextlib.suppress(OSError):
            write_whole(folder / name, data + _seal(kind, name, data))
        # To look at 200,000 files takes seconds, for which nobody is to wait; the first write of a process may be its only one.
        if (self._writes or not self._trimmed_lately()) and self._writes % WRITES_PER_TRIM == 0:
            threading.Thread(target=self._trim_once, daemon=True).start()
        self._writes += 1

    def find(self, name: str) -> Path | None:
        """The folder of compiled files of that name, or None; one whose files are not as they were written is removed."""
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
        """A new folder for about `size` bytes of compiled files, which `find` gives when the block has ended without an error.

        None where there is no usable cache or not enough room. A folder takes at most half the limit, else two that are needed together
        would push each other out at every start; one that turns out larger is not kept, and not tried again.
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

    def drop(self, name: str) -> None:
        """Removes the compiled files of that name."""
        folder = self.path / "engines" / name
        if self._private() and folder.is_dir():
            _remove(folder)

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """A block that one thread of one process runs at a time for each name; without a usable cache there is nothing to wait for."""
        from filelock import FileLock

        folder = self._folder("locks")
        with contextlib.nullcontext() if folder is None else FileLock(folder / f"{name[:32]}.lock"):
            yield

    def problem(self) -> str | None:
        """Why nothing can be kept in the folder, which is made if need be; None where all is well."""
        if self.path == NOWHERE:
            return "the user has no home folder: set $SNOOPI_RT_CACHE to a folder"
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
        except OSError as error:
            return f"it cannot be made: {error.strerror}"
        if not self._private():
            return "it belongs to another user, or others can write into it"
        return None if os.access(self.path, os.W_OK) else "no permission to write into it"

    def sizes(self) -> dict[str, int]:
        """The bytes on disk of each kind."""
        return {kind: sum(size for _, size, _ in self._entries(kind)) for kind in KINDS}

    def trim(self) -> None:
        """Removes the files and folders that were not used for the longest time until the rest is within the limit, and all that whoever
        began it cannot finish any more.

        A folder that is being filled stays: it is one in which something was written lately, since nothing is written for so long only by
        a process that was killed. That needs no lock, which would have to outlive a kill too. A time in the future is that of no use that
        anybody knows.
        """
        now = time.time()
        with contextlib.suppress(OSError):
            os.utime(self.path)  # whose time tells others
        entries = []
        for used, size, path in (entry for kind in KINDS for entry in self._entries(kind)):
            if not path.name.startswith("."):
                entries.append((used if used <= now + LATELY else 0.0, size, path))
            elif abs(used - now) > LATELY:
                _remove(path)
        entries.sort()
        excess = sum(size for _, size, _ in entries) - self.limit
        for _, size, path in entries:
            if excess <= 0:
                break
            _remove(path)
            excess -= size

    def _trimmed_lately(self) -> bool:
        try:
            return abs(time.time() - self.path.stat().st_mtime) < LATELY
        except OSError:
            return False

    def _trim_once(self) -> None:
        if self._trimming.acquire(blocking=False):
            try:
                self.trim()
            finally:
                self._trimming.release()

    def clear(self) -> None:
        """Removes everything that was kept; what else lies in the folder stays, and so does all in a folder that others can write."""
        for kind in KINDS:
            for _, _, path in self._entries(kind):
                _remove(path)

    def _folder(self, kind: str) -> Path | None:
        """The folder of one kind, made if need be, or None where there is no usable cache."""
        folder = self.path / kind
        if self.problem() is not None:
            return None
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError:
            return None
        return folder

    def _fits(self, folder: Path, name: str, size: int) -> bool:
        turned_out_too_large = (folder / name).is_file()
        return not turned_out_too_large and size <= self.limit // 2 and shutil.disk_usage(folder).free > ROOM * size

    def _publish(self, new: Path, folder: Path) -> None:
        with contextlib.suppress(OSError):
            contents = _contents(new)
            if sum(status.st_size for status in _files(new).values()) > self.limit // 2:
                write_whole(folder, b"too large")
                return
            write_whole(new / FILES, json.dumps(contents).encode())
            new.rename(folder)
        self.trim()

    def _entries(self, kind: str) -> Iterator[tuple[float, int, Path]]:
        """The time of the last use, the bytes and the path of each file and folder of one kind."""
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
                        yield status.st_mtime, max(0, status.st_size - SEAL), path

    def _private(self) -> bool:
        """Whether nobody else can plant a file here: it is trusted for hashes of files."""
        if os.name == "nt":
            return True
        try:
            status = self.path.stat()
        except OSError:
            return False
        return status.st_uid == os.getuid() and not stat.S_IMODE(status.st_mode) & 0o022


def _seal(kind: str, name: str, data: bytes) -> bytes:
    return hashlib.sha256(f"{kind}/{name}\n".encode() + data).digest()


def _files(folder: Path) -> dict[str, os.stat_result]:
    """The status of each file but FILES, by its name."""
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat(follow_symlinks=False) for entry in entries if entry.name != FILES}


def _contents(folder: Path) -> dict[str, list[int | str]]:
    """The size and times of each file but FILES, and its digest where they are small: a start must not read gigabytes that it maps next."""
    files = _files(folder)
    small = sum(status.st_size for status in files.values()) <= HASHED
    return {
        name: [status.st_size, status.st_mtime_ns, status.st_ctime_ns, sha256(folder / name) if small else ""]
        for name, status in files.items()
    }


def _remove(path: Path) -> None:
    """Removes a file, or a folder in one step for those who look for it: they find all of it or nothing."""
    with contextlib.suppress(OSError):
        if not path.is_dir() or path.is_symlink():
            path.unlink()
            return
        going = path.with_name(f".{secrets.token_hex(8)}.tmp")
        path.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def default_folder() -> Path:
    """A folder of our own, because it is trimmed and cleared: in $SNOOPI_RT_CACHE, or where this system's users keep caches.

    NOWHERE for a user who has neither.
    """
    if chosen := os.environ.get("SNOOPI_RT_CACHE"):
        return Path(chosen) / "snoopi-rt-cache"
    variable, below_home, name = {
        "win32": ("LOCALAPPDATA", "", "snoopi-rt/cache"),
        "darwin": ("", "Library/Caches", "snoopi-rt"),
    }.get(sys.platform, ("XDG_CACHE_HOME", ".cache", "snoopi-rt"))
    if chosen := os.environ.get(variable):
        return Path(chosen) / name
    if os.environ.get("HOME") == "":  # Path.home() would be the root
        return NOWHERE
    try:
        return Path.home() / below_home / name
    except RuntimeError:  # no HOME, and the system does not know the user
        return NOWHERE
