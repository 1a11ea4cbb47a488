"""The command line: where images go, and how it says what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import needs_engine, run

from snoopi_rt import image
from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cli.main import main


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
        (["", "--neg", "blurry", "--neg-scale", "0,1"], 2, "error: prompt is empty: say what to draw\n"),
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
def test_a_bundle_with_prompts_only_draws_those_and_names_them_for_others(prompts_only: Bundle, here: Path) -> None:
    run("generate", "A cat", "--neg", "blurry", "-o", "cat.png", "--bundle", prompts_only.folder)
    assert (here / "cat.png").is_file()
    result = run("generate", "a dog", "--bundle", prompts_only.folder, code=2)
    assert "(it has no text encoder): 'a red fox', 'a cat', 'blurry'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_folder_without_a_bundle_ends_with_code_one(here: Path) -> None:
    assert run("generate", "a cat", "--bundle", here, code=1).stderr == f"error: no bundle at {here}: it has no bundle.json\n"


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
            ["generate", "a cat", "--neg", "a dog", "--neg", "blurry"],
            "--neg is given 2 times: join the texts with commas (see snoopi-rt generate --help)",
        ),
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
