"""The command line: what it writes, what it says, and how it ends."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from snoopi_rt import image
from snoopi_rt.bundle import Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.choice import measurements
from snoopi_rt.cli import main
from snoopi_rt.engines import installed

HERE = [name for name in installed() if name != "cuda"]
needs_engine = pytest.mark.skipif(not HERE, reason="needs an engine")


def run(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@needs_engine
def test_generate_writes_an_image_that_says_how_it_was_made(original: Bundle, here: Path) -> None:
    result = run("generate", "a red fox", "--neg", "blurry", "--seed", 7, "--size", "16x24", "-o", "fox.png", "--bundle", original.folder)
    assert result.stdout == "fox.png  seed 7\n"
    first = np.asarray(Image.open(here / "fox.png"))
    said = shlex.split(run("info", "fox.png").stdout)
    assert said[:2] == ["snoopi-rt", "generate"]
    said[said.index("tiny")] = str(original.folder)
    run(*said[1:2], "-o", "again.png", *said[2:])
    np.testing.assert_array_equal(np.asarray(Image.open(here / "again.png")), first)


@needs_engine
def test_more_than_one_image_are_written_as_name_and_seed(original: Bundle, here: Path) -> None:
    result = run("generate", "a cat", "-n", 6, "--seed", 2**32 - 3, "-o", "cat.webp", "--bundle", original.folder)
    assert len(result.stdout.splitlines()) == 6
    assert {path.name for path in here.iterdir()} == {f"cat-{seed % 2**32}.webp" for seed in range(2**32 - 3, 2**32 + 3)}


@needs_engine
def test_no_seed_draws_one_and_prints_it(original: Bundle, here: Path) -> None:
    result = run("generate", "a cat", "--bundle", original.folder, "--format", "jpeg")
    path, _, seed = result.stdout.split()
    assert image.read_metadata(here / path)["seed"] == seed
    assert path == "image.jpeg"


@needs_engine
def test_an_existing_file_is_not_overwritten_without_force(original: Bundle, here: Path) -> None:
    (here / "cat.png").write_text("mine")
    words = ("generate", "a cat", "-o", "cat.png", "--bundle", original.folder)
    assert "cat.png is there already" in run(*words, code=2).stderr
    assert (here / "cat.png").read_text() == "mine"
    run(*words, "--force")
    assert image.read_metadata(here / "cat.png")["prompt"] == "a cat"


@needs_engine
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["", "--seed", "1"], 2, "error: prompt is empty"),
        (["a a a a a"], 2, "error: prompt has 7 tokens, the limit is 6"),
        (["a cat", "--neg", "blurry", "--neg-scale", "nan"], 2, "error: negative scale must be a number from 0.0 to 1.0, got nan"),
        (["a cat", "--neg-scale", "0.5"], 2, "error: negative scale 0.5 without a negative prompt"),
        (["a cat", "-n", "0"], 2, "error: n must be an integer of at least 1, got 0"),
        (["a cat", "--seed", "-1"], 2, "error: seed must be an integer of at least 0, got -1"),
        (["a cat", "--size", "32x32"], 2, "error: size 32x32 is not supported, choose from 16x16, 16x24"),
        (["a cat", "--size", "big"], 2, "'big' is not HEIGHTxWIDTH, such as 128x128"),
        (["a cat", "--engine", "gpu"], 2, "error: unknown engine 'gpu', choose from cpu, openvino, cuda, tensorrt"),
        (["a cat", "--engine", "tensorrt"], 1, "error: engine 'tensorrt' is not supported by this version"),
        (["a cat", "--precision", "fp8"], 2, "error: bundle 'tiny' has no precision 'fp8'"),
        (["a cat", "--threads", "0"], 2, "error: threads must be an integer of at least 1, got 0"),
        (["a cat", "-o", "nowhere/cat.png"], 1, "error: cannot write nowhere/cat.png: nowhere is not a folder"),
        (["a cat", "-o", "cat.gif"], 2, "error: cat.gif must end in .png, .jpg, .jpeg, .webp"),
        (["a cat", "-o", "cat.png", "--format", "webp"], 2, "error: cat.png does not end as webp does"),
    ],
)
def test_a_known_error_is_one_line_and_a_code(original: Bundle, here: Path, words: list[str], code: int, message: str) -> None:
    result = run("generate", "--bundle", original.folder, *words, code=code)
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if message.startswith("error"):
        assert len(result.stderr.splitlines()) == 1
    assert list(here.iterdir()) == []


def test_a_folder_without_a_bundle_ends_with_code_one(here: Path) -> None:
    assert run("generate", "a cat", "--bundle", here, code=1).stderr == f"error: no bundle at {here}: it has no bundle.json\n"


@needs_engine
def test_truncate_cuts_and_the_command_says_so(original: Bundle, here: Path) -> None:
    run("generate", "a a a a a", "--truncate", "-o", "a.png", "--bundle", original.folder)
    assert "--truncate" in run("info", "a.png").stdout


def test_debug_shows_the_traceback(here: Path) -> None:
    result = CliRunner().invoke(main, ["--debug", "generate", "a cat", "--bundle", str(here)])
    assert type(result.exception).__name__ == "BundleError"


def test_info_describes_a_bundle(original: Bundle) -> None:
    said = run("info", original.folder, "--verify").stdout
    assert "tiny: backbone none, licence Apache-2.0" in said
    assert "guidance nasa, scale 0.0 to 1.0, default 0.5" in said
    assert original.hash in said


def test_info_verify_finds_damage_that_was_trusted(folder: Path) -> None:
    path = folder / "decoder.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert f"error: {path} is damaged" in run("info", folder, "--verify", code=1).stderr


def test_cache_says_what_is_kept_and_clears_it(cache_folder: Path) -> None:
    Cache().write("states", "a.npy", bytes(3_000_000))
    said = run("cache").stdout
    assert str(cache_folder) in said
    assert "3.0 MB" in said
    assert "3.0 MB" not in run("cache", "--clear").stdout


@needs_engine
def test_bench_ends_with_one_json_document_and_remembers(original: Bundle, here: Path) -> None:
    result = run("bench", "--bundle", original.folder, "--engine", HERE[0], "--runs", 3)
    document = json.loads(result.stdout.splitlines()[-1])
    measured = document["engines"][HERE[0]]
    for way in ("plain", "negative"):
        assert 0 < measured[way]["total"]["p50"] <= measured[way]["total"]["p95"]
    assert measured["cold_start"]["first"] > 0
    assert measured["cold_start"]["peak_memory"] is None or measured["cold_start"]["peak_memory"] > 2**20
    assert measurements(original, Cache()) == {HERE[0]: measured["plain"]["total"]["p50"]}


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_help_shows_an_example(name: str) -> None:
    said = run(name, "--help").output
    assert "xample" in said
    assert f"snoopi-rt {name}" in said


def test_it_runs_as_a_process(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "snoopi_rt", "generate", "a cat", "--bundle", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: no bundle at {tmp_path}: it has no bundle.json\n"
    assert subprocess.run([*words[:3], "--version"], capture_output=True, text=True, check=True).stdout.endswith("0.1.0\n")
