"""Atomic writes (to a temporary file that is then renamed), SHA-256 of files, and careful reading of untrusted ones."""

import errno
import hashlib
import io
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from snoopi_rt.engines.messages import why
from snoopi_rt.errors import InputError, OutputError
from snoopi_rt.shell import quote

_LFS = b"version https://git-lfs.github.com/spec/"

MAX_NAME = 100
"""Bytes of a file name that can be extended on every file system: some allow 143, most 255."""


def write_whole(path: Path, data: bytes, durable: bool = False, new: bool = False) -> None:
    """Writes the file atomically; `durable` also survives a power failure, `new` never replaces a file.

    Raises OSError, with `new` FileExistsError if the file exists.
    """
    temporary = temporary_beside(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if new:
            _rename_new(temporary, path)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_remains(folder: Path) -> None:
    """Removes what `write_whole` left in a folder when its process was killed. Nobody else may be writing to it."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name):
                with suppress(OSError):
                    os.unlink(entry.path)


@contextmanager
def alone(folder: Path, doing: str, out: Path | None = None) -> Iterator[Path]:
    """Makes the folder if need be, and holds its lock: the file that it yields, which stays in the folder. What `write_whole` left there
    when a process was killed is removed.

    Raises OutputError if another process holds it, which is `doing` something ("drawing"), or if nothing can be written. The message
    names the folder, or `out` if the folder will have that name.
    """
    from filelock import FileLock, Timeout

    lock = folder / ".lock"
    if lock.is_symlink():  # which some versions of filelock follow, and empty the file behind it
        raise InputError(f"{quote(lock)} is a symbolic link: remove it")
    held = FileLock(lock, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(NotImplementedError):  # of an older filelock, on a file system without locks: then nothing keeps others out
            held.acquire()
    except Timeout as error:
        raise OutputError(f"another process is {doing} into {quote(out or folder)}") from error
    except OSError as error:
        raise OutputError(f"cannot write into {quote(out or folder)}: {reason(error)}") from error
    try:
        remove_remains(folder)
        yield lock
    finally:
        held.release()


def check_folder(path: Path) -> Path:
    """The path of a folder that exists, else raises InputError."""
    if not path.is_dir():
        raise InputError(f"{quote(path)} is not a folder" if path.exists() else f"no such folder: {quote(path)}")
    return path


def check_place(path: Path) -> None:
    """Checks in advance that a file can be written to the path, if need be after creating its folder.

    Raises OSError for names that are too long, and if the nearest existing folder is not writable.
    """
    folder, names = path.parent, [path.name]
    while not os.path.lexists(folder):
        names.append(folder.name)
        folder = folder.parent
    if not os.path.isdir(folder):
        raise NotADirectoryError(errno.ENOTDIR, f"{quote(folder)} is not a folder", str(folder))
    for place in (*(folder / name for name in names), path, temporary_beside(path)):
        with suppress(FileNotFoundError):
            os.lstat(place)
    # Tried, not queried: a removed working directory and an immutable folder claim to be writable.
    probe = temporary_beside(folder / path.name)
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    os.unlink(probe)


def hidden(path: Path, ending: str) -> Path:
    """A hidden name beside the path, always the same: `.NAME` and the ending, with a hash in place of a NAME that is too long."""
    name = path.name
    if len(os.fsencode(name)) > MAX_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return path.with_name(f".{name}{ending}")


def temporary_beside(path: Path) -> Path:
    """A new name beside the path; not derived from it, because that may already have the maximal length."""
    return path.with_name(f".{secrets.token_hex(8)}.tmp")


_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")


def _rename_new(source: Path, path: Path) -> None:
    """Renames a file, never replacing another. Raises FileExistsError."""
    try:
        os.link(source, path)  # unlike a rename this never replaces a file
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        source.replace(path)


def sha256(path: Path) -> str:
    """The SHA-256 of the file's bytes in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: Path) -> io.BufferedReader:
    """The file, opened for reading. Raises OSError, also if it is not a regular file: a pipe would block, a device never end."""
    try:
        _check_regular(os.stat(path), path)  # before opening, which alone can trigger a device
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a null character
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from error
    try:
        _check_regular(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises OSError."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes", os.fspath(path))
    return data


def reason(error: OSError) -> str:
    """The reason in a few words, also of OSErrors from packages that do not set strerror."""
    return error.strerror or why(error)


def _check_regular(status: os.stat_result, path: Path) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", os.fspath(path))


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a pointer that a clone without git-lfs has in place of a large file. Raises OSError."""
    with open_regular(path) as file:
        return file.read(len(_LFS)) == _LFS
