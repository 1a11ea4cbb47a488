"""Files of prompts: every format gives the same rows, a file is judged once, and a row that is wrong costs itself alone."""

import io
import json
import os
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from snoopi_rt.batch.prompt_file import PromptFile
from snoopi_rt.errors import InputError

JOBS = [
    {"prompt": "a cat, red", "negative_prompt": "blurry", "negative_scale": 0.5, "seed": 3},
    {"prompt": "a fox", "negative_prompt": "warm"},
    {"prompt": "# a cat"},
]
TABLE = 'prompt,negative_prompt,negative_scale,seed\n"a cat, red",blurry,0.5,3\na fox,warm,,\n# a cat,,NaN,nan\n'


def jobs(path: Path, content: str | bytes | None = None, **options: Any) -> list[Any]:
    """The rows of the file, numbered from 1."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with PromptFile(path, **options) as file:
        rows = list(file.rows())
        assert [row.number for row in rows] == list(range(1, len(rows) + 1)) and file.check().rows == len(rows)
        assert rows == list(file.rows())
    return [row.fields for row in rows]


def refused(path: Path, content: str | bytes | None, message: str, **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        jobs(path, content, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    lines = "\n\n".join(json.dumps(job) for job in JOBS[:2]) + '\n"# a cat"\r\n'
    contents = {
        "a.csv": TABLE,
        "a.CSV": "\ufeff\n" + TABLE.replace("\n", "\r\n") + ",,,\n\n",
        "b.csv": 'prompt;negative_prompt;negative_scale;seed;\n"a cat, red";blurry;0,5;3,0;\na fox;warm;;;\n# a cat;;;;\n',
        "c.csv": TABLE.replace(",", "\t").replace("cat\t red", "cat, red"),
        "a.tsv": TABLE.replace(",", "\t").replace("cat\t red", "cat, red"),
        "d.csv": "Unnamed: 0,prompt, seed ,negative_scale,negative_prompt\n"
        + '0,"a cat, red", 3.0,0.5, blurry\n1,a fox,,,warm\n2,# a cat,,,\n',
        "a.jsonl": lines,
        "b.JSONL": lines.replace("{", '{"__index_level_0__": 5, "": NaN, "seed": NaN, ', 2)
        .replace('"seed": NaN, ', "", 1)
        .replace('"": NaN, ', ""),
        "a.json": json.dumps([*JOBS[:2], "# a cat"]),
        "b.json": "\ufeff " + json.dumps(JOBS, indent=3) + "\n",
    }
    for name, content in contents.items():
        assert jobs(tmp_path / name, content) == JOBS, name
    nan = float("nan")
    columns = {
        "prompt": [job["prompt"] for job in JOBS],
        "negative_prompt": ["blurry", "warm", None],
        "negative_scale": [Decimal("0.5"), None, None],
        "seed": [3.0, nan, nan],
        "__index_level_0__": [5, 6, 7],
    }
    assert jobs(write_parquet(tmp_path / "a.parquet", **columns)) == JOBS
    assert jobs(tmp_path / "a.txt", "\ufeff a cat \r\n\n  # a comment\na fox # red") == [{"prompt": "a cat"}, {"prompt": "a fox # red"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.doc", "a", "is not one of .txt, .csv, .tsv, .json, .jsonl, .parquet"),
        ("a.txt", "a cat".encode("utf-16"), "which is not UTF-8 text"),
        ("a.txt", "# nothing\n\n", "contains no prompt"),
        ("a.csv", "", "contains no prompt"),
        ("a.csv", "prompt,seed\n\n,,\n", "contains no prompt"),
        ("a.json", "[]", "contains no prompt"),
        ("a.csv", "prompt,negative\na cat,blurry\n", "has the unknown column 'negative'"),
        ("a.csv", "prompt,,seed\na cat,x,1\n", "has the unknown column 'column 2'"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "a", "negative": "b"}', "has the unknown column 'negative'"),
        ("a.json", '[{"prompt": "a", "negative": "b"}]', "has the unknown column 'negative'"),
        ("a.csv", "a cat\na fox\n", "has no column 'prompt' but 'a cat'"),
        ("a.jsonl", '{"caption": "a"}', "has no column 'prompt' but 'caption'"),
        ("a.csv", "prompt,seed,prompt\na cat,1,a fox\n", "its column 'prompt' appears twice"),
        ("a.csv", 'prompt,seed\na cat,1\n"a fox,2\na dog,3\na cow,4\n', "line 3 is not CSV (unexpected end of data): is a quotation mark"),
        ("a.csv", 'prompt,negative_prompt\n"a cat,blurry\na fox,"warm"\n', "line 2 is not CSV"),
        ("a.csv", "prompt\n" + '"' + "a\n" * 200_000, "line 2 is not CSV"),
        ("a.json", '{"prompt": "a"}', "it is not a list of objects or strings"),
        ("a.json", '["a", "b"', "it ends in the middle of the list"),
        ("a.json", '["a"] "b"', "something follows the list"),
        ("a.parquet", b"PAR1", "it is not a valid Parquet file"),
        ("gone.txt", None, "No such file"),
        (".txt", "a", "is not one of .txt"),
        ("x" * 300 + ".txt", None, "File name too long"),
    ],
)
def test_a_file_that_is_none_is_one_line(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    refused(tmp_path / name, content, message)


def test_unknown_columns_can_be_ignored(tmp_path: Path) -> None:
    for name, content in (("a.csv", "n,prompt,x\n1,a cat,\n"), ("a.json", '[{"n": 1, "prompt": "a cat", "x": {}}]')):
        refused(tmp_path / name, content, "has the unknown column 'n'")
        assert jobs(tmp_path / name, content, ignore_columns=True) == [{"prompt": "a cat"}]


def test_an_option_that_a_caller_does_not_have_is_not_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,negative_scale\na cat,1\n")
    with PromptFile(tmp_path / "a.csv", names=("prompt", "seed")) as file, pytest.raises(InputError, match=r"expected prompt, seed$"):
        file.check()


def test_a_row_that_cannot_be_read_costs_itself(tmp_path: Path) -> None:
    ok = {"prompt": "ok"}
    for name, content, wrong in (
        ("a.txt", b"ok\n\xff\n" + b"x" * (2**20 + 1) + b"\nok\n", ["not UTF-8 text", "longer than 1048576 bytes"]),
        ("a.csv", b"prompt,seed\nok,\n\xff,1\na,1,x\n,5\nok,\n", ["not UTF-8 text", "more cells than columns", "no prompt"]),
        ("a.jsonl", b'"ok"\n3\n{"prompt": "\\ud800"}\n{"prompt": 1' + b"0" * 99 + b'}\n"ok"', ["'3'", "surrogate", "has 100 digits"]),
        (
            "a.json",
            b'["ok", 3, {"a": tru}, ' + b"[" * 99 + b"]" * 99 + b', {"seed": Infinity}, "ok"]',
            ["'3'", "tru", "32 deep", "Infinity"],
        ),
    ):
        first, *odd, last = jobs(tmp_path / name, content)
        assert first == last == ok
        assert len(odd) == len(wrong) and all(isinstance(row, str) and text in row for row, text in zip(odd, wrong, strict=True)), name


def test_what_is_no_number_is_left_to_the_pipeline(tmp_path: Path) -> None:
    rows = jobs(tmp_path / "a.csv", 'prompt,seed\na,1_000\na,"1,000"\na,7.5\na,1e3\na,0x7\na,inf\n')
    assert [row["seed"] for row in rows] == ["1_000", "1,000", 7.5, 1000, "0x7", "inf"]


def test_columns_of_parquet_are_judged_by_their_types(tmp_path: Path) -> None:
    for name, value, kind in (
        ("seed", datetime(2024, 1, 1), "timestamp[us], not numbers"),
        ("negative_scale", timedelta(1), "duration[us], not numbers"),
        ("negative_prompt", datetime(2024, 1, 1), "timestamp[us], not text"),
        ("negative_prompt", [1], "list<element: int64>, not text"),
    ):
        path = write_parquet(tmp_path / "a.parquet", prompt=["a"], **{name: [value]})
        refused(path, None, f"its column {name!r} contains {kind}")
    damaged = bytearray(write_parquet(tmp_path / "a.parquet", prompt=["a cat"] * 5000).read_bytes())
    for place in range(20, len(damaged) - 8, 7):
        damaged[place] ^= 0x55
    refused(tmp_path / "a.parquet", bytes(damaged), "it is not a valid Parquet file")


def test_entries_of_a_list_may_lie_anywhere_in_its_file(tmp_path: Path) -> None:
    """The file is read in pieces of 64 KiB: an entry, a string and an escape are cut by them."""
    prompts = [f'{number} \\ "[{{,é🦊' * (number % 40) + "." for number in range(1000)]
    for indent in (None, 1):
        assert jobs(tmp_path / "a.json", json.dumps(prompts, indent=indent)) == [{"prompt": prompt} for prompt in prompts]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that are files")
def test_a_pipe_is_refused_at_once_and_says_how(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    refused(tmp_path / "pipe.txt", None, "(read a pipe from standard input: - < ")
    (tmp_path / "folder.txt").mkdir()
    refused(tmp_path / "folder.txt", None, "Is a directory")


@pytest.mark.parametrize(
    ("content", "format", "expected"),
    [
        ("a cat\n# no\n{a|b} fox\n", None, ["a cat", "{a|b} fox"]),
        ("{a|b} fox\n[x] cat", None, ["{a|b} fox", "[x] cat"]),
        ('{"prompt": "a cat"}\n', None, ["a cat"]),
        ('["a cat", {"prompt": "a fox"}]', None, ["a cat", "a fox"]),
        ("prompt\na cat\n", None, ["a cat"]),
        ("seed;prompt\n1;a cat\n", None, ["a cat"]),
        ("prompt\na cat\n", "txt", ["prompt", "a cat"]),
        ("prompt,seed\na cat,1\n", "csv", ["a cat"]),
    ],
)
def test_standard_input_is_what_it_looks_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, format: str | None, expected: list[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert [job["prompt"] for job in jobs(Path("-"), format=format)] == expected


def test_a_file_that_is_changed_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a cat\n" * 10_000)
    with PromptFile(path) as file:
        rows = file.rows()
        next(rows)
        os.utime(path, (1, 1))  # the same text at another time
        next(rows)
        path.write_text("a dog\n" * 10_000)
        with pytest.raises(InputError, match="it changed while it was read: start again"):
            next(rows)
    with PromptFile(path) as file:
        rows = file.rows()
        next(rows)
        (tmp_path / "new").write_text("a fox\n")
        os.replace(tmp_path / "new", path)  # the file that was opened is read to its end
        assert {row.fields["prompt"] for row in rows} == {"a dog"}
