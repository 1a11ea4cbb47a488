"""The kinds of input that `fuzz.py` damages, and the one rule: the right picture, or one clear line and the right exit code.

A bundle whose own files say something else, with hashes that fit, is another bundle: of it any picture of the promised size is right.
"""

import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import tiny_bundle

from snoopi_rt.bundle.bundle import MANIFEST, File
from snoopi_rt.engines import installed
from snoopi_rt.errors import InputError, SnoopiError
from snoopi_rt.loading import load

ASKED: dict[str, Any] = {"prompt": "a red fox", "negative_prompt": "blurry", "negative_scale": 0.5, "seed": 7, "size": (16, 16)}
LONGEST = 1000
"""Characters of a clear line."""
PICTURE, REFUSED = "picture", "refused"
ENGINES = [name for name in ("cpu", "openvino") if name in installed()]


class Finding(Exception):
    """Neither the right picture nor one clear line."""


def refused(error: SnoopiError, *codes: int) -> str:
    """REFUSED, for an error that is one clear line and exits with one of the codes. Raises Finding for another."""
    line, code = str(error), 2 if isinstance(error, InputError) else 1
    if code not in codes:
        raise Finding(f"exit code {code}: {line[:200]}")
    if not line.strip() or len(line.splitlines()) > 1 or len(line) > LONGEST or line.endswith((": None", ": ")):
        raise Finding(f"no clear line: {line[:200]!r}")
    return REFUSED


def require_picture(picture: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Raises Finding if the images differ."""
    if picture.shape != expected.shape or not np.array_equal(picture, expected):
        raise Finding(f"a wrong picture of {what}")


class Kind:
    """A kind of input: each `judge` damages one and judges what comes of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bundle = tiny_bundle.write_bundle(folder / "tiny")
        self.manifest = json.loads((self.bundle.folder / MANIFEST).read_text(encoding="utf-8"))

    def judge(self, random: Random) -> str:
        """PICTURE or REFUSED; raises Finding, or whatever else came out."""
        raise NotImplementedError

    def draw(self, engine: str = "cpu", **asked: Any) -> np.ndarray:
        """The picture that the bundle's folder gives, opened anew. Raises what `load` and `generate` do."""
        with load(self.bundle.folder, engine) as pipe:
            return pipe.generate(**{**ASKED, **asked}).images[0]

    def write_manifest(self, document: dict[str, Any]) -> None:
        (self.bundle.folder / MANIFEST).write_text(json.dumps(document), encoding="utf-8")

    def replace_file(self, name: str, data: bytes) -> None:
        """Puts other bytes in the place of one of the bundle's files, with a hash that fits."""
        path, document = self.bundle.folder / name, json.loads(json.dumps(self.manifest))
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        files = [document["text"]["tokenizer"], (document["prompts"] or {}).get("file")]
        files += [file for variants in document["graphs"].values() for variant in variants for file in variant["files"]]
        for file in files:
            if file is not None and file["path"] == name:
                file.update(vars(File.of(path)))
        self.write_manifest(document)


def pixels(file: Any) -> np.ndarray:
    """A PNG's."""
    from PIL import Image

    with Image.open(file) as opened:
        return np.asarray(opened.convert("RGB"))
