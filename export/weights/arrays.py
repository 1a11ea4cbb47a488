"""Arrays in .npy files, mapped into memory for writing."""

import os
from pathlib import Path

import numpy as np

from snoopi_rt.files import temporary_beside


def new_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.memmap:
    """A new array of zeros in the file, whose space is taken at once: on a full disk, writing into a mapped file kills the process.

    Raises OSError if there is no space, and then leaves no file.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        try:
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            path.unlink()
            raise OSError(error.errno, error.strerror, str(path)) from error
    return array


def open_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """The array in a file, mapped for reading and writing; a new one is all zeros. Raises OSError as new_array does."""
    if not path.exists():
        beside = temporary_beside(path)
        new_array(beside, shape, dtype)
        beside.replace(path)
    return np.load(path, mmap_mode="r+")
