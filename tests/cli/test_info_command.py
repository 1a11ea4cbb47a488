"""`snoopi-rt info`: the command that draws an image again, a bundle described and verified."""

import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import needs_engine, run
from PIL import Image

from snoopi_rt.bundle.bundle import Bundle


@needs_engine
def test_generate_writes_an_image_that_says_how_it_was_made(original: Bundle, here: Path) -> None:
    result = run("generate", "a red fox", "--neg", "blurry", "--seed", 7, "--size", "24x16", "-o", "fox.png", "--bundle", original.folder)
    assert result.stdout == "fox.png  seed 7\n"
    first = np.asarray(Image.open(here / "fox.png"))
    told = run("info", "fox.png")
    assert told.stderr == ""
    words = shlex.split(told.stdout)
    assert words[:2] == ["snoopi-rt", "generate"] and words[words.index("--bundle") + 1] == str(original.folder)
    run(*words[1:2], "-o", "again.png", *words[2:])
    np.testing.assert_array_equal(np.asarray(Image.open(here / "again.png")), first)


@needs_engine
def test_the_embedded_bundle_is_known_by_its_hash_and_not_by_its_name(
    original: Bundle, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("generate", "a cat", "-o", "cat.png", "--bundle", original.folder)
    monkeypatch.setattr("snoopi_rt.pipeline.EMBEDDED", original.folder)
    told = run("info", "cat.png")
    assert "--bundle" not in told.stdout
    assert told.stderr == ""
    other = replace(original, licence="other").save(shutil.copytree(original.folder, here / "tiny"))
    monkeypatch.setattr("snoopi_rt.pipeline.EMBEDDED", other.folder)
    assert f"--bundle {original.folder}" in run("info", "cat.png").stdout


@needs_engine
def test_truncate_cuts_and_the_command_says_so(original: Bundle, here: Path) -> None:
    run("generate", "a a a a a", "--truncate", "-o", "a.png", "--bundle", original.folder)
    assert "--truncate" in run("info", "a.png").stdout


def test_what_is_no_image_and_no_bundle_is_called_so(here: Path) -> None:
    os.mkfifo("pipe")
    Path("file").write_bytes(b"GIF89a")
    assert run("info", "file", code=2).stderr == "error: file cannot be read: it is not a valid PNG, JPEG or WebP image\n"
    for name in ("pipe", "/dev/null"):
        assert run("info", name, code=2).stderr == f"error: no bundle at {name}: it is not a folder\n"


def test_info_of_nothing_says_that_there_is_nothing(here: Path) -> None:
    assert run("info", "missing.png", code=2).stderr == "error: no such file or folder: missing.png\n"


def test_info_describes_a_bundle(original: Bundle) -> None:
    said = run("info", original.folder, "--verify").stdout
    assert "tiny: backbone none, licence Apache-2.0" in said
    assert "guidance nasa, negative scale 0 to 1, by default 0.5" in said
    assert original.hash in said and f"\nfolder: {original.folder}\n" in said
    assert "generator: fp32 for cpu, openvino (onnx, 0.0 MB), relative L2 0 of " in said


def test_info_names_two_packages_that_overwrite_each_other(original: Bundle, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxruntime_gpu"):
        (here / f"{name}-1.0.dist-info").mkdir()
        (here / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(here)
    assert "onnxruntime and onnxruntime-gpu are both installed" in run("info", original.folder).stdout.splitlines()[-1]


def test_info_verify_finds_damage_that_was_trusted(folder: Path) -> None:
    path = folder / "decoder.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert f"error: {path} is damaged" in run("info", folder, "--verify", code=1).stderr
