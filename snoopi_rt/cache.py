"""The one cache folder: hashes already verified, prompt states, measurements, compiled models.

Knows no meaning of what it keeps. A cache that cannot be used keeps nothing and says nothing: every reader can do without it.
"""

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from snoopi_rt.files import write_whole

LIMIT = 10 * 2**30
KINDS = ("engines", "hashes", "measurements", "states")
WRITES_PER_TRIM = 256


class Cache:
    """Bytes by kind and file name in one folder, at most `limit` bytes, oldest out. Threads and processes may share it."""

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.path = default_folder() if folder is None else folder
        self.limit = limit
        self._writes = 0

    def read(self, kind: str, name: str) -> bytes | None:
        """What was written, or None."""
        if not self._private():
            return None
        path = self.path / kind / name
        try:
            data = path.read_bytes()
        except OSError:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return data

    def write(self, kind: str, name: str, data: bytes) -> None:
        """Keeps the bytes, if that is possible."""
        folder = self.folder(kind)
        if folder is None:
            return
        with contextlib.suppress(OSError):
            write_whole(folder / name, data)
        if self._writes % WRITES_PER_TRIM == 0:
            self.trim()
        self._writes += 1

    def folder(self, kind: str) -> Path | None:
        """The folder of one kind, made if need be, or None where there is no usable cache."""
        folder = self.path / kind
        if self.problem() is not None:
            return None
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError:
            return None
        return folder

    def problem(self) -> str | None:
        """Why nothing can be kept in the folder, which is made if need be; None where all is well."""
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
        except OSError as error:
            return f"it cannot be made: {error.strerror}"
        if not self._private():
            return "it belongs to another user, or others can write into it"
        return None if os.access(self.path, os.W_OK) else "no permission to write into it"

    def sizes(self) -> dict[str, int]:
        """The bytes on disk of each kind."""
        return {kind: sum(size for _, size, _ in self._files(kind)) for kind in KINDS}

    def trim(self) -> None:
        """Removes the files that were not used for the longest time until the rest is within the limit."""
        files = sorted(file for kind in KINDS for file in self._files(kind))
        excess = sum(size for _, size, _ in files) - self.limit
        for _, size, path in files:
            if excess <= 0:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
            excess -= size

    def clear(self) -> None:
        """Removes everything that was kept; what else lies in the folder stays, and so does all in a folder that others can write."""
        for kind in KINDS:
            for _, _, path in self._files(kind):
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def _files(self, kind: str) -> Iterator[tuple[float, int, str]]:
        for folder, _, names in os.walk(self.path / kind) if self._private() else ():
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(OSError):
                    status = os.lstat(path)
                    yield status.st_mtime, status.st_size, path

    def _private(self) -> bool:
        """Whether nobody else can plant a file here: it is trusted for hashes of files."""
        if os.name == "nt":
            return True
        try:
            status = self.path.stat()
        except OSError:
            return False
        return status.st_uid == os.getuid() and not stat.S_IMODE(status.st_mode) & 0o022


def default_folder() -> Path:
    """A folder of our own, because it is trimmed and cleared: in $SNOOPI_RT_CACHE, or where this system's users keep caches."""
    if chosen := os.environ.get("SNOOPI_RT_CACHE"):
        return Path(chosen) / "snoopi-rt-cache"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "snoopi-rt" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "snoopi-rt"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snoopi-rt"
