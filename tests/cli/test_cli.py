"""The command line: what it writes, what it says, and how it ends."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from snoopi_rt import cache, image, pipeline
from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.cli.main import main
from snoopi_rt.diagnostics.bench import cold_start
from snoopi_rt.engines import installed
from snoopi_rt.runtime.auto_engine import Measurement, measurements

HERE = [name for name in installed() if name in ("cpu", "openvino")]
needs_engine = pytest.mark.skipif(not HERE, reason="needs an engine")


def run(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words], prog_name="snoopi-rt")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
def test_more_than_one_image_are_written_as_name_and_seed(original: Bundle, here: Path) -> None:
    result = run("generate", "a cat", "-n", 6, "--seed", 2**32 - 6, "-o", "cat.webp", "--bundle", original.folder)
    assert len(result.stdout.splitlines()) == 6
    assert {path.name for path in here.iterdir()} == {f"cat-{seed}.webp" for seed in range(2**32 - 6, 2**32)}


@needs_engine
def test_an_existing_folder_gets_the_image(original: Bundle, here: Path) -> None:
    (here / "out").mkdir()
    run("generate", "a cat", "-o", "out", "-n", 2, "--seed", 3, "--format", "webp", "--bundle", original.folder)
    assert {path.name for path in (here / "out").iterdir()} == {"a-cat-3.webp", "a-cat-4.webp"}


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
def test_no_seed_draws_one_and_prints_it(original: Bundle, here: Path) -> None:
    result = run("generate", "a cat", "--bundle", original.folder, "--format", "jpeg")
    path, _, seed = result.stdout.split()
    assert image.read_metadata(here / path)["seed"] == seed
    assert path == f"a-cat-{seed}.jpeg"


@needs_engine
def test_an_existing_file_is_not_overwritten_without_force(original: Bundle, here: Path) -> None:
    (here / "cat.png").write_text("mine")
    words = ("generate", "a cat", "-o", "cat.png", "--bundle", original.folder)
    assert "cat.png already exists" in run(*words, code=2).stderr
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
        (["a cat", "-n", "1000000000"], 2, "error: n must be an integer of at most 10000, got 1000000000"),
        (["a cat", "--seed", "-1"], 2, "error: seed must be an integer from 0 to 4294967295, got -1"),
        (["a cat", "--size", "32x32"], 2, "error: size 32x32 is not supported, choose from 16x16, 24x16"),
        (["a cat", "--size", "big"], 2, "'big' is not WIDTHxHEIGHT, such as 512x512"),
        (["a cat", "--engine", "gpu"], 2, "error: unknown engine 'gpu', choose from cpu, openvino, cuda, tensorrt"),
        (["a cat", "--engine", "tensorrt"], 1, "error: bundle 'tiny' has no generator for engine 'tensorrt', it supports cpu"),
        (["a cat", "--precision", "fp8"], 2, "error: bundle 'tiny' has no precision 'fp8'"),
        (
            ["a cat", "--precision", "unet=fp32"],
            2,
            "error: precision 'unet=fp32': unknown graph 'unet', choose from text_encoder, generator",
        ),
        (["a cat", "--precision", "decoder=int8"], 2, "error: bundle 'tiny' has no decoder in precision 'int8' for engine 'cpu'"),
        (["a cat", "--threads", "0"], 2, "error: threads must be an integer of at least 1, got 0"),
        (["a cat", "-o", "/dev/null/cat.png"], 1, "error: cannot write /dev/null/cat.png: /dev/null is not a folder"),
        (["a cat", "-o", f"new/{'x' * 252}.png"], 1, f"error: cannot write new/{'x' * 252}.png: File name too long"),
        (["a cat", "-o", "new/cat.gif"], 2, "error: new/cat.gif must end in .png, .jpg, .jpeg, .webp"),
        (["a cat", "-o", "cat.gif"], 2, "error: cat.gif must end in .png, .jpg, .jpeg, .webp"),
        (["a cat", "-o", "cat.png", "--format", "webp"], 2, "error: the ending of cat.png is not that of webp"),
        (["a cat", "--neg", "blurry", "--neg-scale", "0,5"], 2, "error: negative scale must be a number from 0.0 to 1.0, got 5.0"),
        (["a cat", "--neg", "blurry", "--neg-scale", "0;1"], 2, "error: negative scale '0;1': give a number, or several such as 0,0.5,1"),
        (["a cat", "--side-by-side"], 2, "error: --side-by-side compares the image without and with a negative prompt: give --neg TEXT"),
        (["a cat", "-n", "2", "-o", "-"], 2, "error: -o - writes one image, not 2: give a folder"),
        (["a cat", "-o", "-", "--open"], 2, "error: --open needs a file: -o - writes none"),
        (["a cat", "--out", "folder"], 2, "error: --out goes with --prompts: use -o for one PROMPT"),
        (["a cat", "--bundle", ""], 2, "error: --bundle is empty: give a folder"),
        (["a cat", "--bundle", "x\x1b[31m"], 2, "error: no bundle at x$'\\033'[31m: no such folder"),
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


@needs_engine
def test_prompts_of_a_file_are_encoded_once(original: Bundle, here: Path) -> None:
    (here / "presets.txt").write_bytes("\ufeff# animals\r\na red fox\r\n\r\n  A cat \n#a dog\na cat".encode())
    words = ("prompts", "--bundle", original.folder, "presets.txt", "--engine", HERE[0])
    assert run(*words).stdout == "2 encoded, 1 already cached\n"
    assert run(*words).stdout == "0 encoded, 3 already cached\n"
    encoder = original.folder / "text_encoder.onnx"
    hidden = encoder.rename(here / "hidden.onnx")
    try:
        with pipeline.open_pipeline(original, HERE[0], None, None, Cache()) as pipe:
            assert len(pipe(["a red fox", "a cat"]).images) == 2
    finally:
        hidden.rename(encoder)


@needs_engine
def test_a_bad_line_of_a_file_is_named_and_costs_the_others_nothing(original: Bundle, here: Path) -> None:
    (here / "presets.txt").write_bytes(b"a cat\n\na a a a a\na red fox\n\xff\nblurry\n")
    words = ("prompts", "--bundle", original.folder, "presets.txt", "--engine", HERE[0])
    result = run(*words, code=2)
    assert result.stdout == "3 encoded, 0 already cached\n"
    long, foreign = result.stderr.splitlines()
    assert long.startswith("error: presets.txt line 3: prompt has 7 tokens, the limit is 6")
    assert foreign == "error: presets.txt line 5: not UTF-8 text"
    assert run(*words, code=2).stdout == "0 encoded, 3 already cached\n"


@pytest.mark.parametrize(
    ("data", "message"), [(b"", "contains no prompt"), (b"# nothing\n\n", "contains no prompt"), (None, "No such file")]
)
def test_a_file_without_prompts_is_one_line(original: Bundle, here: Path, data: bytes | None, message: str) -> None:
    if data is not None:
        (here / "presets.txt").write_bytes(data)
    result = run("prompts", "--bundle", original.folder, "presets.txt", code=2)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@needs_engine
def test_prompts_that_cannot_be_kept_are_an_error(original: Bundle, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "file").write_bytes(b"")
    (here / "presets.txt").write_text("a cat")
    monkeypatch.setenv("SNOOPI_RT_CACHE", "file")
    words = ("prompts", "--bundle", original.folder, "presets.txt", "--engine", HERE[0])
    assert "prompt states cannot be kept in file/snoopi-rt-cache: it cannot be created: Not a directory" in run(*words, code=1).stderr


@needs_engine
def test_a_bundle_with_prompts_only_draws_those_and_names_them_for_others(prompts_only: Bundle, here: Path) -> None:
    run("generate", "A cat", "--neg", "blurry", "-o", "cat.png", "--bundle", prompts_only.folder)
    assert (here / "cat.png").is_file()
    result = run("generate", "a dog", "--bundle", prompts_only.folder, code=2)
    assert "(it has no text encoder): 'a red fox', 'a cat', 'blurry'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_folder_without_a_bundle_ends_with_code_one(here: Path) -> None:
    assert run("generate", "a cat", "--bundle", here, code=1).stderr == f"error: no bundle at {here}: it has no bundle.json\n"


@needs_engine
def test_truncate_cuts_and_the_command_says_so(original: Bundle, here: Path) -> None:
    run("generate", "a a a a a", "--truncate", "-o", "a.png", "--bundle", original.folder)
    assert "--truncate" in run("info", "a.png").stdout


def test_debug_before_or_behind_the_command_shows_the_traceback(here: Path) -> None:
    words = ["generate", "a cat", "--bundle", str(here)]
    for index in (0, 1, 4):
        result = CliRunner().invoke(main, [*words[:index], "--debug", *words[index:]])
        assert type(result.exception).__name__ == "BundleError"
    assert run("generate", "--bundle", here, "--", "--debug", code=1).stderr.startswith("error: no bundle at ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "--port", "0x1f"], "invalid value for '--port': '0x1f' is not a valid integer (see snoopi-rt serve --help)"),
        (["generate", "a cat", "--qqq", "7"], "no such option '--qqq' (see snoopi-rt generate --help)"),
        (["prompts"], "missing argument 'FILE' (see snoopi-rt prompts --help)"),
        (
            ["generate", "a cat", "a dog"],
            "got unexpected extra argument (a dog): quote words that belong together (see snoopi-rt generate --help)",
        ),
        (
            ["serve", "--timeout", "86401"],
            "invalid value for '--timeout': 86401.0 is not in the range 0<x<=86400 (see snoopi-rt serve --help)",
        ),
        (["draw"], "no such command 'draw' (see snoopi-rt --help)"),
        (["train", "qqq"], "no such command 'qqq' (see snoopi-rt train --help)"),
        (["serve", "--engine", "gpu"], "unknown engine 'gpu', choose from cpu, openvino, cuda, tensorrt"),
        (["generate", "a cat", "-o", ""], "-o is empty: give a file name"),
    ],
)
def test_what_is_typed_wrongly_is_one_line_that_says_where_to_read_on(here: Path, words: list[str], message: str) -> None:
    assert run(*words, code=2).stderr == f"error: {message}\n"
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(("name", "code"), [("gpu", 2), ("tensorrt", 1)])
def test_bench_knows_before_it_measures_that_an_engine_cannot_be_measured(
    original: Bundle, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    monkeypatch.setattr("snoopi_rt.diagnostics.bench.measure_engine", lambda *_: pytest.fail("measured"))
    assert len(run("bench", "--bundle", original.folder, "--engine", HERE[0], "--engine", name, code=code).stderr.splitlines()) == 1


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
    assert original.hash in said
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


def test_cache_says_what_is_kept_and_clears_it(cache_folder: Path) -> None:
    Cache().write("states", "a.npy", bytes(3_000_000))
    said = run("cache").stdout
    assert str(cache_folder) in said
    assert "3.0 MB" in said
    assert "add --yes" in run("cache", "--clear", code=2).stderr
    refused = CliRunner().invoke(main, ["cache", "--clear"], input="n\n")
    assert refused.exit_code == 1 and "Remove 3.0 MB from" in refused.stderr
    assert Cache().sizes()["states"] == 3_000_000
    assert CliRunner().invoke(main, ["cache", "--clear"], input="y\n").stdout.startswith("removed 3.0 MB\n")
    assert Cache().sizes()["states"] == 0
    assert run("cache", "--clear", "--yes").stdout.startswith("removed 0 kB\n")
    assert "--yes goes with --clear" in run("cache", "--yes", code=2).stderr


def test_a_cache_that_cannot_be_cleared_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    Cache().write("states", "a.npy", bytes(3_000_000))
    monkeypatch.setattr(cache, "_remove", lambda path: None)  # as on a disk that is read-only
    told = run("cache", "--clear", "--yes", code=1)
    assert told.stdout == "removed 0 kB\n" and told.stderr.startswith("error: 3.0 MB could not be removed from ")


def test_cache_says_why_it_cannot_be_used(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "file").write_bytes(b"")
    monkeypatch.setenv("SNOOPI_RT_CACHE", "file")
    assert "nothing is cached: it cannot be created: Not a directory" in run("cache").stdout


@needs_engine
@pytest.mark.parametrize("name", HERE)
def test_build_compiles_ahead_and_says_what_it_runs_on(original: Bundle, name: str, here: Path) -> None:
    said = run("build", "--bundle", original.folder, "--engine", name).stdout
    assert said.startswith("ready on CPU") and str(Cache().path) in said
    assert (Cache().sizes()["engines"] > 0) == (name == "openvino")  # ONNX Runtime keeps nothing so small
    assert "has no generator for engine 'tensorrt'" in run("build", "--bundle", original.folder, "--engine", "tensorrt", code=1).output


@needs_engine
def test_bench_ends_with_one_json_document_and_remembers(original: Bundle, here: Path) -> None:
    result = run("bench", "--bundle", original.folder, "--engine", HERE[0], "--runs", 3)
    document = json.loads(result.stdout.splitlines()[-1])
    measured = document["engines"][HERE[0]]
    for way in ("plain", "negative"):
        assert 0 < measured[way]["total"]["p50"] <= measured[way]["total"]["p95"]
    assert measured["cold_start"]["first"] > 0
    assert measured["cold_start"]["peak_memory"] is None or measured["cold_start"]["peak_memory"] > 2**20
    assert measured["provider"]
    best = Measurement(dict.fromkeys(original.graphs, "fp32"), measured["plain"]["total"]["p50"])
    assert measurements(original, Cache()) == {HERE[0]: best}
    assert result.stdout.splitlines()[-2] == f"from now on --engine auto uses {HERE[0]} in fp32"
    assert Cache().sizes()["states"] == 0, "its random prompts are nobody's"


@needs_engine
@pytest.mark.parametrize("words", [("--threads", 1), ("--precision", "fp32")])
def test_bench_remembers_only_what_load_does_by_itself(
    original: Bundle, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...]
) -> None:
    monkeypatch.setattr(
        "snoopi_rt.diagnostics.bench.cold_start",
        lambda *given: dict.fromkeys(("first", "again", "peak_memory", "peak_again")) | {"first": 1.0, "again": 1.0},
    )
    said = run("bench", "--bundle", original.folder, "--engine", HERE[0], "--runs", 1, *words).stdout.splitlines()[-2]
    assert said.startswith("--engine auto uses cpu in fp32, as before: measurements with --precision or --threads")
    assert measurements(original, Cache()) == {}


@needs_engine
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak")
def test_the_memory_of_a_cold_start_is_its_own_and_not_that_of_the_process_that_measures(original: Bundle) -> None:
    size = 2**29
    assert np.ones(size, np.uint8).all()
    peak = cold_start(original.folder, HERE[0], None, 1)["peak_memory"]
    assert peak is None or 2**24 < peak < size


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_help_shows_an_example(name: str) -> None:
    said = run(name, "--help").output
    assert "xample" in said
    assert f"snoopi-rt {name}" in said


def test_it_runs_as_a_process(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "snoopi_rt", "generate", "a cat", "--bundle", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: no bundle at {tmp_path}: it has no bundle.json\n"
    assert subprocess.run([*words[:3], "--version"], capture_output=True, encoding="utf-8", check=True).stdout.endswith("0.1.0\n")
