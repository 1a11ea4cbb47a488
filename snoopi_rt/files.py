"""Files that are whole or not there: written beside, then renamed; and the SHA-256 of a file."""

import hashlib
import os
import secrets
from pathlib import Path


def write_whole(path: Path, data: bytes, durable: bool = False) -> None:
    """Writes the file so that nobody ever sees a part of it; `durable` also survives a power cut. Raises OSError."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "xb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The SHA-256 of the file's bytes in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
