"""Arrays in files that are mapped into memory."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from snoopi_rt.export.weights.arrays import open_array


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="there a full disk is seen only when it is written to")
def test_a_full_disk_is_an_error_when_an_array_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.npy"
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=r"No space left on device: .*\.tmp"):
            open_array(path, (1000, 1000), np.float32)
    assert not list(tmp_path.iterdir())
    assert not open_array(path, (1000, 1000), np.float32).any()
    assert path.stat().st_blocks * 512 >= 4e6
