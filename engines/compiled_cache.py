"""Compiled models that engines keep between starts: where, and under which name."""

import hashlib
import json
import platform
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol


class CompiledModels(Protocol):
    """Folders of files by name, each complete or missing. Threads and processes share them."""

    def find(self, name: str) -> Path | None:
        """The folder, which is marked as used now; None if it is missing or its files are not as they were written."""

    def fill(self, name: str, size: int) -> AbstractContextManager[Path | None]:
        """A new folder, stored under the name when the block ends without an error; None if about `size` bytes cannot be stored."""

    def drop(self, name: str) -> None:
        """Removes the folder, whose contents do not work."""

    def alone(self, name: str) -> AbstractContextManager[None]:
        """A lock per name across threads and processes, for models that take minutes to compile."""


def model_files(path: Path) -> list[Path]:
    """The model file and the files of weights beside it: NAME.onnx.data, NAME.bin, and those of other models that it reads."""
    own = [path.with_name(f"{path.name}.data"), path.with_suffix(".bin")]
    shared = [file for file in sorted(path.parent.glob("*.data")) if file not in own]
    if shared:
        model = path.read_bytes()
        shared = [file for file in shared if file.name.encode() in model]
    return [path, *(file for file in (*own, *shared) if file.is_file() and file != path)]


def compiled_name(path: Path, key: str, *circumstances: str) -> str:
    """A name that changes with the model's files, `key` (the hash of their contents, if known), the processor and the circumstances.

    Raises OSError if there is no model file.
    """
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in model_files(path)]
    return hashlib.sha256(json.dumps([files, key, processor(), circumstances]).encode()).hexdigest()


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model and features: compiled models and measurements are valid for one processor."""
    # Other lines, such as the clock, change from one start to the next.
    lasting = ("model name", "stepping", "flags", "CPU implementer", "CPU part", "CPU revision", "Features")
    try:
        with open(cpuinfo, errors="replace", encoding="utf-8") as file:
            first = file.read(2**14).partition("\n\n")[0]
    except OSError:
        first = ""
    lines = [line for line in first.splitlines() if line.partition(":")[0].strip() in lasting]
    return "\n".join(lines or (platform.system(), platform.machine(), platform.processor()))
