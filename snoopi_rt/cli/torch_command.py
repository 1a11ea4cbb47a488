"""What the commands of the PyTorch side share: clear errors for missing extras and for files that cannot be read or written."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snoopi_rt.errors import InputError, OutputError, PackageMissing, SnoopiError, how_to_install
from snoopi_rt.files import check_place, hidden, reason
from snoopi_rt.shell import quote

_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
"""Errors that the system raises only when writing."""


@contextmanager
def torch_command(command: str, extra: str, out: Path) -> Iterator[None]:
    """Checks before the block runs that `out` can be written and that torchvision, if it is installed, imports. Turns missing packages
    into PackageMissing, which names the extra, and OSErrors into InputError or OutputError, which name the file. Silences transformers'
    warnings about torchvision."""
    try:
        if out != Path():
            check_place(out / "config.json")
    except OSError as error:
        raise OutputError(f"cannot write {quote(out)}: {reason(error)}") from error
    transformers = logging.getLogger("transformers.utils.import_utils")
    transformers.addFilter(_not_about_torchvision)
    try:
        from snoopi_rt.export.torchvision_operators import import_torchvision

        import_torchvision()  # before transformers and diffusers do
        yield
    except (SnoopiError, BrokenPipeError):
        raise
    except ImportError as error:
        raise PackageMissing(f"{command} needs {error.name}: {how_to_install(extra)}") from error
    except OSError as error:
        raise _file_error(error, command, out) from error
    finally:
        transformers.removeFilter(_not_about_torchvision)


def _not_about_torchvision(record: logging.LogRecord) -> bool:
    """Whether a warning is about anything else: diffusers imports image processors that want torchvision, and nothing here uses them."""
    return "requires torchvision" not in record.getMessage()


def _file_error(error: OSError, command: str, out: Path) -> SnoopiError:
    """The error of a command that writes into `out`, and beside it until it is done, and reads all other files."""
    writing = error.errno in _WRITE_ERRORS
    if error.filename is None:
        return OutputError(f"cannot write {quote(out)}: {reason(error)}") if writing else SnoopiError(f"{command}: {reason(error)}")
    file, folder = (Path(os.path.abspath(path)) for path in (os.fsdecode(error.filename), out))
    if any(file.is_relative_to(place) for place in (folder, hidden(folder, ".part"), hidden(folder, ".old"))):
        return OutputError(f"cannot write {quote(out)}: {reason(error)}")
    path = quote(os.fsdecode(error.filename))
    return OutputError(f"cannot write {path}: {reason(error)}") if writing else InputError(f"cannot read {path}: {reason(error)}")
