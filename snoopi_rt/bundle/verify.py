"""A bundle's files on disk: reading bundle.json, and checking that each file is the one it promises."""

import hashlib
import json
import os
import stat
from contextlib import suppress
from pathlib import Path

from snoopi_rt.bundle.manifest import HASH, MANIFEST, File, require
from snoopi_rt.bundle.onnx_file import external_data
from snoopi_rt.cache import Cache
from snoopi_rt.errors import BundleError, BundleMissing
from snoopi_rt.files import is_lfs_pointer, read_bounded, reason, sha256
from snoopi_rt.json_reader import parse_json

MAX_MANIFEST = 2**24
"""Bytes: 100,000 prompts of a hundred characters take 12 million."""
Stamp = tuple[int, ...]
MAX_FOLDERS = 4
"""How many folders of a bundle are remembered: it may have been copied, and the copy removed."""


def read_manifest(folder: Path) -> bytes:
    """The bytes of the folder's bundle.json. Raises BundleMissing if there is no folder, BundleError if it has none."""
    path = folder / MANIFEST
    try:
        if not folder.is_dir():
            raise BundleMissing(f"no bundle at {folder}: {'it is not a folder' if folder.exists() else 'no such folder'}")
        require(path.exists(), f"no bundle at {folder}: it has no {MANIFEST}")
        require(not path.is_symlink(), f"{path} is a symbolic link")
        return read_bounded(path, MAX_MANIFEST)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {reason(error)}") from error


def check_file(folder: Path, file: File, cache: Cache | None) -> list[str]:
    """The names of the file's external data. A hash in the cache is trusted if the file's stamp is unchanged.

    Raises BundleError if it is not the file that bundle.json promises.
    """
    path = folder / file.path
    try:
        status = path.lstat()
        require(not stat.S_ISLNK(status.st_mode), f"{path} is a symbolic link, which a bundle may not contain")
        require(stat.S_ISREG(status.st_mode), f"{path} is not a file")
        if status.st_size != file.size:
            require(not is_lfs_pointer(path), f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its clone")
            raise BundleError(_other_file(path, f"{status.st_size} bytes instead of {file.size}"))
        if cache is not None and (record := _names(cache.read("hashes", _hash_key(status, file.sha256)))) is not None:
            return record
        require(sha256(path) == file.sha256, _other_file(path, f"its SHA-256 is not the one in {MANIFEST}"))
        return _note_hash(path, status, file.sha256, cache)
    except FileNotFoundError:
        raise BundleError(f"{path} is missing") from None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {reason(error)}") from error


def _other_file(path: Path, difference: str) -> str:
    """What is wrong with a file that is not the one in bundle.json, and what to do."""
    remedy = f"export or download it again, or update size and sha256 in {MANIFEST} if you changed it"
    return f"{path} is damaged or was changed ({difference}): {remedy}"


def hash_file(path: Path, cache: Cache) -> File:
    """The manifest's entry for a file as it is on disk now; the cache notes its hash, so that `check_file` does not compute it again."""
    status = path.lstat()
    file = File(path.name, sha256(path), status.st_size)
    _note_hash(path, status, file.sha256, cache)
    return file


def _note_hash(path: Path, status: os.stat_result, digest: str, cache: Cache | None) -> list[str]:
    external = external_data(path) if path.suffix == ".onnx" else []
    if cache is not None:
        cache.write("hashes", _hash_key(status, digest), json.dumps(external).encode())
    return external


def _hash_key(status: os.stat_result, digest: str) -> str:
    return f"{'-'.join(map(str, _stamp(status)))}-{digest}.json"


def stamp(path: Path) -> Stamp | None:
    """A tuple that changes whenever the file at the path changes; None if there is no file."""
    try:
        return _stamp(path.lstat())
    except OSError:
        return None


def _stamp(status: os.stat_result) -> Stamp:
    # ctime cannot be set by users, and a new file often reuses the inode of a removed one.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def remember_folder(folder: Path, hash: str, cache: Cache) -> None:
    """Remembers the folder of the bundle with that hash of its bundle.json, for `find_folder`."""
    known = _names(cache.read("bundles", f"{hash}.json")) or []
    with suppress(OSError):  # the working directory was removed
        path = os.path.abspath(folder)
        if known[:1] != [path]:
            folders = [path, *(other for other in known if other != path)]
            cache.write("bundles", f"{hash}.json", json.dumps(folders[:MAX_FOLDERS]).encode())


def find_folder(hash: str, cache: Cache) -> Path | None:
    """A folder from which the bundle with that hash was loaded and where it still is, or None."""
    if HASH.fullmatch(hash) is None:  # it comes from an image's metadata
        return None
    for folder in map(Path, _names(cache.read("bundles", f"{hash}.json")) or []):
        with suppress(BundleError, ValueError):
            if hashlib.sha256(read_manifest(folder)).hexdigest() == hash:
                return folder
    return None


def _names(data: bytes | None) -> list[str] | None:
    """The list of names in a cache entry; None if it is missing or damaged."""
    try:
        names = parse_json(data or b"null")
    except ValueError:
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
