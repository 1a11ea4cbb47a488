"""Tensors and folders of weights in diffusers layout on disk, written atomically: under a hidden name first, then renamed."""

import errno
import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from snoopi_rt.errors import InputError, PackageMissing
from snoopi_rt.files import check_folder, temporary_beside, write_whole

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file atomically."""
    part = temporary_beside(path)
    try:
        part.touch()
        mode = part.stat().st_mode  # by the user's umask; safetensors makes files that nobody else may read
        save_file({name: value.contiguous() for name, value in tensors.items()}, part, metadata=dict(metadata or {}))
        part.chmod(mode)
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        part.replace(path)
    except SafetensorError as error:  # wraps the system's own errors
        raise OSError(errno.EIO, str(error), str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def shard_file(folder: Path, number: int) -> Path:
    """The file of that shard of a folder of tensors."""
    return folder / f"shard-{number:05}.safetensors"


def save_diffusers(model: nn.Module, folder: Path) -> None:
    """Writes a diffusers model as fp16 weights and then its config: a folder that has config.json is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, {name: value.to(torch.float16) for name, value in model.state_dict().items()})
    # Some classes register values that their own constructor does not take, and then warn about them at each load.
    known = {*inspect.signature(type(model).__init__).parameters, "_class_name", "_diffusers_version"}
    config = {key: value for key, value in json.loads(model.to_json_string()).items() if key in known}
    write_whole(folder / CONFIG, (json.dumps(config, indent=1, sort_keys=True) + "\n").encode())


def require(folder: Path, made_by: str) -> Path:
    """The folder, if it holds complete weights. Raises InputError that names the command which makes them."""
    check_folder(folder)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).exists():
            raise InputError(f"no {file} in {folder}: it is written by a finished {made_by}")
    return folder


@contextmanager
def nothing_if_refused(*folders: Path) -> Iterator[None]:
    """Removes the folders that the block made if it raises InputError or PackageMissing: an empty folder would block the name for other
    commands."""
    made = [next(path for path in (*reversed(folder.parents), folder) if not path.exists()) for folder in folders if not folder.exists()]
    try:
        yield
    except (InputError, PackageMissing):
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def fingerprint(*files: Path) -> str:
    """The SHA-256 of several files' contents, in hexadecimal."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while part := file.read(2**24):
                digest.update(part)
    return digest.hexdigest()
