"""`snoopi-rt generate PROMPT`: where the prompt comes from, what is drawn from it, and what the files are called."""

import io
import json
import os
import pwd
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from snoopi_rt import image
from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cli.main import main
from snoopi_rt.cli.prompt_input import read_prompt
from snoopi_rt.engines import installed
from snoopi_rt.errors import InputError
from snoopi_rt.image_names import image_paths, slug
from snoopi_rt.pipeline import Pipeline

needs_engine = pytest.mark.skipif("cpu" not in installed(), reason="needs an engine")
Generate = Callable[..., Result]


@pytest.fixture
def generate(folder: Path, original: Bundle, here: Path) -> Generate:
    """`generate` with the tiny bundle, which has two examples."""
    bundle = replace(original, examples=("a red fox", "a blue cat")).save(folder)

    def run(*words: object, stdin: Any = None, code: int = 0) -> Result:
        result = CliRunner().invoke(main, ["generate", "--bundle", str(bundle.folder), "--engine", "cpu", *map(str, words)], input=stdin)
        assert result.exit_code == code, result.output
        return result

    return run


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened)


@needs_engine
@pytest.mark.parametrize("words", [(), ("-",), ("--", "-")])
def test_standard_input_is_one_prompt_whatever_its_lines(generate: Generate, words: tuple[str, ...]) -> None:
    result = generate("--seed", 1, *words, stdin="\ufeffa red \r\n\n  fox\n")
    assert result.stdout == "a-red-fox-1.png  seed 1\n" and result.stderr == ""
    assert image.read_metadata(Path("a-red-fox-1.png"))["prompt"] == "a red fox"


@needs_engine
@pytest.mark.parametrize("words", [(), ("-",)])
@pytest.mark.parametrize("stdin", ["", " \n\t\n"])
def test_without_a_prompt_an_example_of_the_bundle_is_drawn_and_named(generate: Generate, words: tuple[str, ...], stdin: str) -> None:
    result = generate(*words, "--neg", "blurry", "--seed", 3, stdin=stdin)
    assert result.stderr == "no prompt given, drawing an example: 'a blue cat'\n" and result.stdout == "a-blue-cat-3.png  seed 3\n"


def test_a_bundle_without_examples_draws_a_prompt_that_it_stores_or_asks_for_one(original: Bundle, prompts_only: Bundle) -> None:
    run = CliRunner().invoke(main, ["generate", "--bundle", str(original.folder)], input="")
    assert run.exit_code == 2 and run.stderr == "error: give a PROMPT: bundle 'tiny' has no example prompts\n"
    from snoopi_rt.cli.prompt_input import example

    assert example(prompts_only, 4) == "a cat"


def test_a_terminal_is_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for typed, prompt in (("a red fox\nmore\n", "a red fox"), ("\n", None), ("", None)):
        monkeypatch.setattr("sys.stdin", Terminal(typed))
        assert read_prompt(None) == prompt
        assert capsys.readouterr() == ("", "What to draw (Enter alone: an example): ")
    monkeypatch.setattr("sys.stdin", None)
    assert read_prompt(None) is None is read_prompt("-") and read_prompt("a cat") == "a cat"


@needs_engine
def test_a_pipe_into_which_nothing_comes_is_waited_for_with_a_word(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(io.BytesIO):
        def read(self, *size: Any) -> bytes:
            time.sleep(0.2)
            return super().read(*size)

    monkeypatch.setattr("snoopi_rt.cli.options.PROGRESS_SECONDS", 0.02)
    assert generate("--seed", 1, stdin=Slow(b"a fox")).stderr.startswith("waiting for a prompt on standard input (0 s)\n")


@pytest.mark.parametrize(("stdin", "message"), [(b"\xff\xfea", "is not UTF-8 text"), (b"x" * 2**21, "is too long for a prompt")])
def test_standard_input_that_is_no_prompt_is_one_line(generate: Generate, stdin: bytes, message: str) -> None:
    result = generate(stdin=stdin, code=2)
    assert result.stderr.startswith(f"error: standard input {message}") and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red fox", "a-red-fox"),
        ("it's „Füchse“, 2!", "its-fuchse-2"),
        ("赤い狐", "image"),
        ("../../etc/passwd\n\x1b[31m", "etc-passwd-31m"),
        ("a fox and " * 12, "a-fox-and-a-fox-and-a-fox-and-a-fox-and-a-fox-and-a-fox-and"),
        ("x" * 100, "x" * 60),
    ],
)
def test_a_file_is_named_after_its_prompt(prompt: str, name: str) -> None:
    assert slug(prompt) == name and len(name) <= 60
    assert image_paths(None, "jpg", [prompt], [7], [None]) == [Path(f"{name}-7.jpg")]


@needs_engine
def test_the_second_picture_takes_another_name_and_force_is_for_names_that_were_chosen(generate: Generate, here: Path) -> None:
    words = [generate("a red fox", "--seed", 7, *more).stdout.split()[0] for more in ((), (), ("--force",), ("-o", "."))]
    assert words == ["a-red-fox-7.png", "a-red-fox-7-2.png", "a-red-fox-7-3.png", "a-red-fox-7-4.png"]
    assert {path.name for path in here.iterdir()} == set(words)


@needs_engine
def test_folders_are_made_and_formats_go_by_their_usual_endings(generate: Generate, here: Path) -> None:
    generate("a cat", "-o", "cats/", "--seed", 1, "--format", "jpg")
    generate("a cat", "-o", "new/deep/cat.jpeg", "--format", "jpg")
    generate("a cat", "-o", "new/it", "--format", "jpg")
    names = {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()}
    assert names == {"cats/a-cat-1.jpg", "new/deep/cat.jpeg", "new/it.jpg"}


@needs_engine
def test_standard_output_gets_the_picture_and_nothing_else(generate: Generate, here: Path) -> None:
    generate("a cat", "--seed", 1, "-o", "cat.png")
    result = generate("a cat", "--seed", 1, "-o", "-", "--json")
    assert result.stdout_bytes == (here / "cat.png").read_bytes()
    assert json.loads(result.stderr) | {"timings": None} == json.loads(result.stderr) | {"timings": None, "file": None, "seed": 1}
    assert len(list(here.iterdir())) == 1


@needs_engine
def test_one_seed_is_drawn_at_each_scale(generate: Generate, here: Path) -> None:
    result = generate("a cat", "--neg", "blurry", "--neg-scale", "0,0.5,1,0.5,-0", "--seed", 4, "-n", 2)
    names = [f"a-cat-{seed}-{scale}.png" for seed in (4, 5) for scale in ("0", "0.5", "1")]
    assert [line.split("  ")[0] for line in result.stdout.splitlines()] == names
    assert result.stdout.splitlines()[1] == "a-cat-4-0.5.png  seed 4  scale 0.5"
    generate("a cat", "--seed", 5, "-o", "plain.png")
    np.testing.assert_array_equal(pixels("a-cat-5-0.png"), pixels("plain.png"))
    assert image.read_metadata(Path("a-cat-5-0.5.png"))["negative_scale"] == "0.5"


@needs_engine
def test_side_by_side_is_one_file_without_and_with_and_info_draws_it_again(generate: Generate, here: Path) -> None:
    words = ("a cat", "--neg", "blurry", "--seed", 4, "--size", "24x16")
    generate(*words, "--neg-scale", "0.25,1")
    generate("a cat", "--seed", 4, "--size", "24x16", "-o", "without.png")
    generate(*words, "--neg-scale", "0.25,1", "--side-by-side", "-o", "both.png")
    parts = [pixels(name) for name in ("without.png", "a-cat-4-0.25.png", "a-cat-4-1.png")]
    np.testing.assert_array_equal(pixels("both.png"), np.hstack(parts))
    again = shlex.split(CliRunner().invoke(main, ["info", "both.png"]).stdout)
    assert CliRunner().invoke(main, [again[1], "-o", "again.png", *again[2:]]).exit_code == 0
    assert (here / "again.png").read_bytes() == (here / "both.png").read_bytes()


@needs_engine
def test_json_is_one_line_per_picture(generate: Generate) -> None:
    first, second = map(json.loads, generate("a \x7fcat", "--seed", 1, "-n", 2, "--json").stdout.splitlines())
    assert (first["file"], first["seed"], first["negative_prompt"], first["negative_scale"]) == ("a-cat-1.png", 1, None, None)
    assert second["seed"] == 2 and second["prompt"] == "a \x7fcat" and second["timings"]["total"] > 0
    both = json.loads(generate("a cat", "--neg", "blurry", "--side-by-side", "--json").stdout)
    assert both["negative_scale"] == [0.5] and both["side_by_side"] == "yes"


@needs_engine
def test_open_shows_every_picture_once_it_is_there(generate: Generate, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("snoopi_rt.cli.output.subprocess.run", lambda command, **_: shown.append(str(command[1])))
    generate("a cat", "-n", 2, "--seed", 1, "--open")
    assert shown == [str(here / f"a-cat-{seed}.png") for seed in (1, 2)]
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setenv("PATH", "")
    assert generate("a cat", "-o", "x.png", "--open", code=1).stderr == "error: x.png was written, but there is no program to show it\n"


@pytest.mark.parametrize(
    "words",
    [
        ("-o", "file/x.png"),
        ("-o", f"{'x' * 250}.png", "-n", 2),
        ("-o", "x.png"),
        ("-o", f"{'n' * 256}/"),
        ("-o", "/proc/x.png"),
        ("-o", "/dev/null"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_loaded(
    generate: Generate, here: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...]
) -> None:
    (here / "file").touch()
    (here / "x.png").symlink_to("nowhere")
    monkeypatch.setattr("snoopi_rt.loading.load", lambda *given, **named: pytest.fail("loaded"))
    result = CliRunner().invoke(main, ["generate", "a cat", *map(str, words)])
    assert result.exit_code in (1, 2) and result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


@needs_engine
def test_a_format_that_cannot_hold_the_picture_is_refused_before_it_is_drawn(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "generate", lambda *given, **named: pytest.fail("drawn"))
    assert "jpeg cannot hold it" in generate("ü " * 15_000, "--truncate", "-o", "x.jpg", code=1).stderr


@needs_engine
@pytest.mark.parametrize("home", [None, "", "/dev/null/home"])
def test_without_a_home_it_draws_and_keeps_nothing(
    generate: Generate, here: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    for name in ("SNOOPI_RT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)

    def unknown(user: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    generate("a cat", "-o", "cat.png")
    assert CliRunner().invoke(main, ["info", "cat.png"]).exit_code == 0
    kept = CliRunner().invoke(main, ["cache"])
    assert kept.exit_code == 0 and "nothing is cached: " in kept.stdout
    assert [path.name for path in here.iterdir()] == ["cat.png"]


@needs_engine
def test_a_foreign_picture_gives_a_command_that_a_shell_reads_as_it_was(generate: Generate, here: Path) -> None:
    made = {
        "prompt": "-",
        "negative_prompt": "--debug",
        "seed": "1\x1b]0;title\x07",
        "bundle": "it's\nmine",
        "bundle_hash": "../x",
        "snoopi_rt": "9",
    }
    image.save(np.zeros((8, 8, 3), np.uint8), here / "it's.png", made)
    told = CliRunner().invoke(main, ["info", "it's.png"])
    assert told.output.replace("\n", "").isprintable() and len(told.stderr.splitlines()) == 1
    assert told.stderr.startswith("replace FOLDER by the folder of bundle $'it\\'s\\nmine' (hash ../x): ")
    argv = subprocess.run(["bash", "-c", f"printf '%s\\0' {told.stdout}"], capture_output=True, encoding="utf-8", check=True).stdout
    assert argv.split("\0")[:-1] == ["snoopi-rt", "generate", " -", "--neg=--debug", "--seed", made["seed"], "--bundle", "FOLDER"]


@needs_engine
def test_a_strange_bundle_and_path_reach_the_terminal_quoted(original: Bundle, folder: Path, here: Path) -> None:
    evil = "\x1b[31m"
    strange = replace(original, name=evil, licence=f"{evil}\n", provenance={evil: evil}).save(folder)
    place = folder.rename(here / f"a {evil}")
    told = CliRunner().invoke(main, ["info", str(place)])
    assert told.exit_code == 0 and told.output.replace("\n", "").isprintable() and f"hash {strange.hash}" in told.output
    drawn = CliRunner().invoke(main, ["generate", "a cat", "--bundle", str(place), "-o", f"{evil}/x.png"])
    assert drawn.stdout.startswith("$'\\033[31m/x.png'  seed ")
    document = json.loads((place / "bundle.json").read_text())
    (place / "bundle.json").write_text(json.dumps({**document, evil: 1}))
    for words in (["info", str(place)], ["generate", "a", evil], ["info", evil], [evil], ["info", f"--{evil}"]):
        failed = CliRunner().invoke(main, words)
        assert failed.exit_code != 0 and failed.output.replace("\n", "").isprintable(), words


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    """As in `snoopi-rt presets | head`."""
    for words in (["info"], ["--help"], ["generate", "--help"]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-m", "snoopi_rt", *words], stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path, encoding="utf-8", check=False
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (0, ""), words


def test_a_result_saves_itself_and_shows_itself(pipe: Pipeline, here: Path) -> None:
    one, three = pipe("a cat", seed=7), pipe(["a cat", "a red fox", "a cat"], "blurry", [0, 1, 0.5], seed=[7, 7, 7])
    assert one.save("cat.png") == one.save("cat.png") == [Path("cat.png")]
    assert image.read_metadata(Path("cat.png"))["seed"] == "7"
    assert [path.name for path in three.save("new/x.webp")] == ["x-7-0.webp", "x-7-1.webp", "x-7-0.5.webp"]
    assert [str(path) for path in [*one.save("."), *one.save("."), *one.save("dogs/")]] == [
        "a-cat-7.png",
        "a-cat-7-2.png",
        "dogs/a-cat-7.png",
    ]
    Path("sent.webp").write_bytes(three.encode("webp")[2])
    assert image.read_metadata(Path("sent.webp")) == three.metadata(2)
    assert one.encode() == [Path("cat.png").read_bytes()] and len(three.encode("jpeg", quality=5)[0]) < len(three.encode("jpeg")[0])
    with pytest.raises(InputError, match=r"unknown image format 'gif', choose from png, jpeg, webp"):
        one.encode("gif")
    with pytest.raises(InputError, match="quality must be an integer of at most 100, got 900"):
        one.encode("jpeg", quality=900)
    assert repr(pipe) == "<Pipeline: 'tiny' on cpu, fp32, up to 4 images at once>"
    assert repr(pipe.bundle).startswith("<Bundle: 'tiny', backbone none, 16x16, 24x16, guidance nasa, for cpu, openvino, in '/")
    assert repr(one).startswith("<Result: 1 image of 16x16, 'a cat', seed 7, cpu, ")
    assert repr(three).startswith("<Result: 3 images of 16x16, 'a cat' and 1 more, seed 7, cpu, ")
    assert "seeds 3 to 5, cpu" in repr(pipe("a cat", seed=[5, 3]))
    shown = pixels(io.BytesIO(three._repr_png_()))  # type: ignore[arg-type]
    assert shown.shape == (32, 32, 3)
    np.testing.assert_array_equal(shown[:16], np.hstack(three.images[:2]))
    np.testing.assert_array_equal(shown[16:, :16], three.images[2])


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--prompts", "prompts.txt", "--out", "file/out"),
        ("export", "--backbone", "small", "--weights", "weights", "--out", "file/out"),
        ("train", "teacher", "--data", "data", "--decoder", "vae", "--out", f"new/{'x' * 256}"),
        ("merge", "one", "two", "--out", "/proc/out"),
    ],
)
def test_no_command_begins_what_it_could_not_write(here: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    (here / "file").touch()
    (here / "prompts.txt").write_text("a cat")
    monkeypatch.setattr("snoopi_rt.loading.load", lambda *given, **named: pytest.fail("loaded"))
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1 and result.stderr.startswith("error: cannot write ") and len(result.stderr.splitlines()) == 1
    assert sorted(path.name for path in here.iterdir()) == ["file", "prompts.txt"]


@needs_engine
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a current folder cannot be removed")
def test_a_removed_current_folder_is_one_line_before_anything_is_loaded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here.rmdir()
    monkeypatch.setattr("snoopi_rt.loading.load", lambda *given, **named: pytest.fail("loaded"))
    result = CliRunner().invoke(main, ["generate", "a cat", "--seed", "1"])
    assert result.stderr == "error: cannot write a-cat-1.png: No such file or directory\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_behind_standard_output_is_one_line(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "snoopi_rt", "cache"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, cwd=tmp_path, encoding="utf-8", check=False)
    assert (done.returncode, done.stderr) == (1, "error: cannot write to standard output: No space left on device\n")
