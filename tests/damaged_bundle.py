"""Changes to the folder of a bundle, and the check that it is refused in one clear line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.errors import BundleError


def refused(folder: Path, message: str) -> None:
    with pytest.raises(BundleError, match=re.escape(message)) as caught:
        Bundle.load(folder)
    assert "\n" not in str(caught.value)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((folder / "bundle.json").read_text())
    change(document)
    (folder / "bundle.json").write_text(json.dumps(document))


def generator(document: dict[str, Any]) -> dict[str, Any]:
    return document["graphs"]["generator"][0]


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
