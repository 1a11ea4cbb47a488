"""`generate --prompts FILE --out FOLDER`: every row once, whole files only, and what became of each row in the index."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from snoopi_rt.batch.index import INDEX, Index
from snoopi_rt.batch.runner import Batch
from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cli.main import main
from snoopi_rt.engines import installed
from snoopi_rt.errors import InputError, OutputError
from snoopi_rt.pipeline import Pipeline


def index(folder: Path) -> list[dict]:
    """The index without its first line."""
    return [json.loads(line) for line in (folder / INDEX).read_text().splitlines()][1:]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\na red fox\na blue fox\na fox\na blue cat\n")
    return path


def test_each_row_is_one_image_with_a_seed_of_its_own(pipe: Pipeline, prompts: Path, tmp_path: Path) -> None:
    told: list[int] = []
    outcome = Batch(prompts, tmp_path / "out", seed=7, negative="blurry", scale=0.5).run(pipe, told.append)
    assert (outcome.drawn, outcome.kept, outcome.failed, sum(told)) == (5, 0, 0, 5)
    rows = index(tmp_path / "out")
    assert [row["row"] for row in rows] == [1, 2, 3, 4, 5] and [row["seed"] for row in rows] == [7, 8, 9, 10, 11]
    size = (tmp_path / "out" / "000002.png").stat().st_size
    assert rows[1] == {
        "row": 2, "file": "000002.png", "bytes": size, "prompt": "a red fox", "negative_prompt": "blurry", "negative_scale": 0.5, "seed": 8,
    }  # fmt: skip
    with Image.open(tmp_path / "out" / "000002.png") as opened:
        np.testing.assert_array_equal(np.asarray(opened), pipe.generate("a red fox", "blurry", 0.5, 8).images[0])


def test_what_is_there_is_not_drawn_again_and_what_is_gone_is(pipe: Pipeline, prompts: Path, tmp_path: Path) -> None:
    batch = Batch(prompts, tmp_path / "out")
    batch.run(pipe)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    (tmp_path / "out" / "000003.png").unlink()
    outcome = batch.run(pipe)
    assert (outcome.drawn, outcome.kept) == (1, 4)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    assert {name for name in before if before[name] != after[name]} == {"000003.png"}
    assert sorted(row["row"] for row in index(tmp_path / "out")) == [1, 2, 3, 4, 5]


def test_an_index_that_a_kill_cut_short_is_made_whole(pipe: Pipeline, prompts: Path, tmp_path: Path) -> None:
    batch = Batch(prompts, tmp_path / "out", negative="blurry")
    batch.run(pipe)
    whole = index(tmp_path / "out")
    lines = (tmp_path / "out" / INDEX).read_bytes()
    (tmp_path / "out" / INDEX).write_bytes(lines[:-70])
    assert batch.run(pipe).drawn == 0
    assert index(tmp_path / "out") == whole


def test_what_a_killed_run_left_half_written_goes_and_hidden_files_of_others_stay(pipe: Pipeline, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in (".0123456789abcdef.tmp", ".mine.tmp"):
        (out / name).write_bytes(b"half")
    Batch(prompts, out).run(pipe)
    assert [path.name for path in out.glob(".*.tmp")] == [".mine.tmp"]


def test_an_image_of_something_else_is_neither_taken_nor_lost(pipe: Pipeline, prompts: Path, tmp_path: Path) -> None:
    """The index is gone and a prompt was changed: the old picture is not the new row's."""
    out = tmp_path / "out"
    Batch(prompts, out, negative="blurry", scale=0.5).run(pipe)
    (out / INDEX).unlink()
    prompts.write_text(prompts.read_text().replace("a red fox", "a red cat"))
    (out / "000004.png").write_bytes(b"")  # a power cut
    (out / "000005.png").write_bytes(b"somebody's")
    outcome = Batch(prompts, out, negative="blurry", scale=0.5).run(pipe)
    assert (outcome.drawn, outcome.kept, outcome.failed) == (1, 2, 2)
    errors = {row["row"]: row["error"] for row in index(out) if "error" in row}
    assert errors == {row: f"00000{row}.png is there and is not this row's image: remove it" for row in (2, 5)}
    assert (out / "000005.png").read_bytes() == b"somebody's"


def test_a_damaged_line_of_the_index_costs_that_line_alone(pipe: Pipeline, prompts: Path, tmp_path: Path) -> None:
    batch = Batch(prompts, tmp_path / "out")
    batch.run(pipe)
    path = tmp_path / "out" / INDEX
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], lines[2][:9] + lines[3], b"[]", b'{"row": "x", "file": 1}', *lines[4:]]))
    outcome = batch.run(pipe)
    assert (outcome.drawn, outcome.kept) == (0, 5) and sorted(row["row"] for row in index(tmp_path / "out")) == [1, 2, 3, 4, 5]
    path.write_text("no index\n")
    with pytest.raises(InputError, match=r"index.jsonl is not an index of snoopi-rt$"):
        batch.run(pipe)
    assert path.read_text() == "no index\n" and not list(path.parent.glob("*.part")) + list(path.parent.glob(".*.part"))
    path.write_bytes(b"")  # a power cut
    assert batch.run(pipe).kept == 5


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_an_image_that_is_not_whole_is_drawn_again(pipe: Pipeline, prompts: Path, tmp_path: Path, format: str) -> None:
    batch, out = Batch(prompts, tmp_path / "out", format=format), tmp_path / "out"
    batch.run(pipe)
    whole = {path.name: path.read_bytes() for path in out.glob(f"*.{format}")}
    lines = (out / INDEX).read_text().splitlines()
    without_sizes = [json.dumps({name: value for name, value in json.loads(line).items() if name != "bytes"}) for line in lines]
    for index_lines, length in ((lines, 1), (without_sizes, 1), (lines, 40)):
        (out / INDEX).write_text("\n".join(index_lines) + "\n")
        (out / f"000002.{format}").write_bytes(whole[f"000002.{format}"][:-length])
        (out / f"000003.{format}").write_bytes(b"\0" * len(whole[f"000003.{format}"]))  # a power cut
        outcome = batch.run(pipe)
        assert (outcome.drawn, outcome.kept, outcome.failed) == (2, 3, 0)
        assert {path.name: path.read_bytes() for path in out.glob(f"*.{format}")} == whole
    assert all(row["bytes"] == len(whole[row["file"]]) for row in index(out))


def test_a_line_of_the_index_is_for_its_own_row_and_job(pipe: Pipeline, prompts: Path, tmp_path: Path) -> None:
    batch, out = Batch(prompts, tmp_path / "out"), tmp_path / "out"
    batch.run(pipe)
    first, *lines = (out / INDEX).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows[1]["file"] = "000003.png"
    rows[2]["prompt"] = "a red cat"  # the picture itself says otherwise
    rows[3] |= {"row": 10**30, "file": f"{10**30}.png"}
    (out / INDEX).write_text("\n".join([first, *map(json.dumps, rows), '{"row": [[]], "file": "000005.png"}', "[" * 10**5]) + "\n")
    (out / "000002.png").unlink()
    outcome = batch.run(pipe)
    assert (outcome.drawn, outcome.kept, outcome.failed) == (1, 4, 0)
    assert {row["row"]: row["prompt"] for row in index(out)} == {1: "a cat", 2: "a red fox", 3: "a blue fox", 4: "a fox", 5: "a blue cat"}


def test_what_lies_in_the_place_of_an_image_costs_its_row_and_is_kept(pipe: Pipeline, prompts: Path, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (out / "000001.png").mkdir(parents=True)
    os.mkfifo(out / "000002.png")
    (out / "000003.png").symlink_to("/dev/zero")
    elsewhere.write_bytes(b"mine")
    (out / "000004.png").symlink_to(elsewhere)
    (out / "000005.png").symlink_to(tmp_path / "nowhere")
    (out / f".{INDEX}.part").symlink_to(elsewhere)
    outcome = Batch(prompts, out).run(pipe)
    assert (outcome.drawn, outcome.failed) == (1, 4)
    assert {row["row"] for row in index(out) if row.get("error", "").endswith("is not this row's image: remove it")} == {1, 2, 3, 4}
    assert elsewhere.read_bytes() == b"mine" and not (tmp_path / "nowhere").exists() and (out / "000005.png").is_file()
    (out / ".lock").unlink()
    (out / ".lock").symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"\.lock is a symbolic link: remove it"):
        Batch(prompts, out).run(pipe)
    (out / ".lock").unlink()
    (out / ".lock").mkdir()
    with pytest.raises(OutputError, match=r"cannot write into .*out: Is a directory"):
        Batch(prompts, out).run(pipe)
    assert elsewhere.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.5}, "negative scale 0.5 without a negative prompt: neither a row nor --neg gives one"),
        ({"scale": 0.5, "negative": "  "}, "negative scale 0.5 without a negative prompt"),
        ({"scale": 7, "negative": "blurry"}, "negative scale must be a number from 0.0 to 1.0, got 7"),
        ({"negative": "a a a a a a a"}, "prompt has 9 tokens, the limit is 6"),
        ({"seed": -5}, "seed must be an integer from 0 to 4294967295, got -5"),
        ({"seed": 2**32}, "seed must be an integer from 0 to 4294967295, got 4294967296"),
        ({"size": (32, 32)}, "size 32x32 is not supported"),
    ],
)
def test_a_setting_that_no_row_can_have_is_refused_once(
    pipe: Pipeline, prompts: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Batch(prompts, tmp_path / "out", **settings).run(pipe)
    assert not (tmp_path / "out").exists()


def test_a_scale_is_used_where_a_row_has_a_negative_prompt(pipe: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,negative_prompt\na cat,\na fox,blurry\n")
    Batch(tmp_path / "rows.csv", tmp_path / "out", scale=0.25).run(pipe)
    assert [row.get("negative_scale") for row in index(tmp_path / "out")] == [None, 0.25]


def test_two_at_once_do_not_share_a_folder(pipe: Pipeline, prompts: Path, tmp_path: Path) -> None:
    batch = Batch(prompts, tmp_path / "out")

    def second(rows: int) -> None:
        with pytest.raises(OutputError, match=r"^another process is drawing into .*out$"):
            Batch(prompts, tmp_path / "out").run(pipe)
        told.append(rows)

    told: list[int] = []
    assert batch.run(pipe, second).drawn == 5 and len(told) == 5


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(
    pipe: Pipeline, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, add = Batch(prompts, tmp_path / "out"), Index.add

    class Full:
        """A file that takes half of a line."""

        def write(self, line: bytes) -> int:
            return len(line) // 2

    def full(self: Index, number: int, record: dict) -> None:
        self._file, kept = Full(), self._file  # type: ignore[assignment]
        try:
            add(self, number, record)
        finally:
            self._file = kept

    with monkeypatch.context() as patch, pytest.raises(OutputError, match=r"the disk is full$"):
        patch.setattr(Index, "add", full)
        batch.run(pipe)
    assert batch.run(pipe).drawn == 4


def test_what_is_null_or_empty_in_a_row_was_not_said(pipe: Pipeline, tmp_path: Path) -> None:
    rows = [
        '{"prompt": "a cat", "seed": null, "negative_prompt": null, "negative_scale": null}',
        '{"prompt": "a fox", "negative_prompt": ""}',
    ]
    (tmp_path / "rows.jsonl").write_text(
        "\n".join([*rows, '{"prompt": "a cat", "negative_prompt": "blurry", "negative_scale": 1' + "0" * 400 + "}"])
    )
    outcome = Batch(tmp_path / "rows.jsonl", tmp_path / "out", seed=5, negative="blurry", scale=0.5).run(pipe)
    first, second, third = sorted(index(tmp_path / "out"), key=lambda row: row["row"])
    assert (first["seed"], first["negative_prompt"], first["negative_scale"]) == (5, "blurry", 0.5)
    assert second["seed"] == 6 and "negative_prompt" not in second and outcome.drawn == 2
    assert third["error"].endswith("(the number 1000000000... has 401 digits, at most 40 are read)")


def test_rows_that_cannot_be_drawn_are_listed_and_the_rest_is_done(pipe: Pipeline, tmp_path: Path) -> None:
    rows = ['{"prompt": "a cat", "seed": 3}', "no json", '{"prompt": "a a a a a a"}', "[" * 900 + "]" * 900, '{"seed": 1}']
    rows += ['{"prompt": "a fox", "negative_scale": 7, "negative_prompt": "blurry"}', '{"prompt": "a blue fox", "seed": "x"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    outcome = Batch(tmp_path / "rows.jsonl", tmp_path / "out").run(pipe)
    assert (outcome.drawn, outcome.failed) == (1, 6)
    errors = {row["row"]: row["error"] for row in index(tmp_path / "out") if "error" in row}
    assert errors.keys() == {2, 3, 4, 5, 6, 7} and all("\n" not in error for error in errors.values())
    assert errors[2].startswith("not a JSON object: 'no json'") and "limit" in errors[3] and errors[5] == "no prompt"
    assert errors[4].endswith("(nested more than 32 deep)")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"000001.png", INDEX, ".lock"}


def test_another_batch_does_not_mix_with_what_is_there(pipe: Pipeline, prompts: Path, tmp_path: Path) -> None:
    Batch(prompts, tmp_path / "out").run(pipe)
    with pytest.raises(InputError, match="holds another batch"):
        Batch(prompts, tmp_path / "out", negative="blurry").run(pipe)
    (tmp_path / "out" / INDEX).write_text("not ours\n")
    with pytest.raises(InputError, match="is not an index of snoopi-rt"):
        Batch(prompts, tmp_path / "out").run(pipe)


@pytest.mark.skipif("cpu" not in installed(), reason="needs onnxruntime")
def test_a_killed_run_goes_on_without_drawing_an_image_twice(tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    rows = [f"a panda on a {colour} background" for colour in ("red", "blue", "green", "gray") for _ in range(50)]
    prompts.write_text("\n".join(rows))
    words = [sys.executable, "-m", "snoopi_rt", "generate", "--prompts", prompts, "--out", out, "--engine", "cpu"]
    running = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(out.glob("*.png"))) < 70 and running.poll() is None:
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert 70 <= len(before) < len(rows)
    done = subprocess.run(words, capture_output=True, encoding="utf-8", check=True)
    assert f"{len(rows) - len(before)} drawn" in done.stdout and f"{len(before)} already there" in done.stdout
    assert all((out / name).stat().st_mtime_ns == time for name, time in before.items())
    assert sorted(row["row"] for row in index(out)) == list(range(1, len(rows) + 1))
    for path in out.glob("*.png"):
        with Image.open(path) as opened:
            opened.load()


@pytest.mark.skipif("cpu" not in installed(), reason="needs onnxruntime")
def test_prompts_come_from_standard_input_too(original: Bundle, tmp_path: Path) -> None:
    def run(*words: Any, code: int = 0, text: str = "seed;prompt;n\n3.0;a cat;1\n") -> str:
        command = ["generate", "--bundle", original.folder, "--engine", "cpu", "--out", tmp_path / "out", "--prompts", *words]
        result = CliRunner().invoke(main, [str(word) for word in command], input=text)
        assert result.exit_code == code, result.output
        return result.output

    assert "error: cannot" not in run("-", code=2) and not (tmp_path / "out").exists()
    assert "1 drawn" in run("-", "--ignore-columns") and "1 already there" in run("-", "--ignore-columns")
    assert index(tmp_path / "out")[0]["seed"] == 3
    assert "holds another batch" in run("-", "--ignore-columns", code=2, text="prompt\na fox")
    assert "error: standard input contains no prompt" in run("-", code=2, text="")
    (tmp_path / "latin.txt").write_bytes("ein Bär\n".encode("latin-1"))
    assert f"error: {tmp_path}/latin.txt contains no prompt: line 1: not UTF-8 text\n" == run(tmp_path / "latin.txt", code=2)
    (tmp_path / "rows").write_text('"a cat"\n')
    assert "give --prompts-format" in run(tmp_path / "rows", code=2)
    assert "holds another batch" in run(tmp_path / "rows", "--prompts-format", "jsonl", code=2)


def test_the_command_line_says_what_is_missing(tmp_path: Path) -> None:
    for words, message in (
        (["generate", "--out", tmp_path], "--prompts FILE and --out FOLDER go together"),
        (["generate", "a cat", "--out", tmp_path], "--out goes with --prompts"),
        (["generate", "--prompts", tmp_path / "p.txt", "--out", tmp_path, "-n", 2], "-n is for one PROMPT"),
        (["generate", "--prompts", tmp_path / "p.txt", "--out", tmp_path, "--neg-scale", "0,1"], "several scales are for one PROMPT"),
        (["generate", "--prompts", tmp_path / "p.txt", "--out", tmp_path, "--force"], "--force is for one PROMPT"),
        (["generate", "a cat", "--ignore-columns"], "go with --prompts FILE"),
    ):
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == 2 and message in result.output
