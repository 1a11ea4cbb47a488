"""JSON and numbers that somebody else wrote: what is odd is one ValueError or OSError, in bounded time and memory."""

import os
import socket
from pathlib import Path

import pytest

from snoopi_rt.files import read_bounded
from snoopi_rt.json_reader import MAX_DEPTH, parse_json, parse_number, read_json


def test_what_is_json_is_read() -> None:
    text = '{"a": [1, -2.5, 1e3, null, true, "\\ud83e\\udd8a é"], "b": {}, "n": 18446744073709551616}'
    expected = {"a": [1, -2.5, 1000.0, None, True, "🦊 é"], "b": {}, "n": 2**64}
    assert parse_json(text) == parse_json(text.encode()) == parse_json(b"\xef\xbb\xbf" + text.encode()) == expected
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    assert parse_json('{"seed": NaN}', nan_is_null=True) == {"seed": None}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe[\x00]\x00", "not UTF-8 text"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested more than 32 deep"),
        (b"[" * 900 + b"]" * 900, "nested more than 32 deep"),
        (b"[" * 10**6, "nested more than 32 deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested more than 32 deep"),
        (b"1" + b"0" * 400, "the number 1000000000... has 401 digits"),
        (b"-" + b"9" * 10**6, "the number -999999999... has 1000001 digits"),
        (b"1e400", "the number 1e400 is out of range"),
        (b"[1, NaN]", "NaN is not a number"),
        (b"-Infinity", "-Infinity is not a number"),
        (b'{"seed": 1, "seed": 2}', "duplicate key 'seed'"),
        (b'["\\ud800"]', "half of a surrogate pair"),
        (b'{"\\udfff": 1}', "half of a surrogate pair"),
        (b"{} {}", "Extra data"),
    ],
)
def test_what_is_odd_is_one_line(data: bytes, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_json(data)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_a_number_as_text() -> None:
    assert [parse_number(text) for text in ("7", " -7 ", "7.0", ".5", "1e3")] == [7, -7, 7.0, 0.5, 1000.0]
    assert parse_number("NaN") is parse_number("nan") is None
    for text in ("", "1_000", "٣", "0x10", "inf", "1e999", "9" * 50, "1,5", "7 8"):
        with pytest.raises(ValueError, match=r"number|could not"):
            parse_number(text)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that are files")
def test_a_file_without_end_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(20 * 2**30)
    (tmp_path / "link").symlink_to("/dev/zero")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    with listening:
        for name, message in (
            ("pipe", "pipe or a device"),
            ("socket", "pipe or a device"),
            ("link", "pipe or a device"),
            ("sparse", "it has more than 1000 bytes"),
            (".", "Is a directory"),
            ("none", "No such file"),
            ("x" * 300, "File name too long"),
            ("nul\0l", "null"),
        ):
            with pytest.raises(OSError, match=message):
                read_bounded(tmp_path / name, 1000)
    (tmp_path / "small").write_bytes(b"[1]")
    assert read_bounded(tmp_path / "small", 3) == b"[1]" and read_json(tmp_path / "small", 3) == [1]
    with pytest.raises(OSError, match="more than 2 bytes"):
        read_json(tmp_path / "small", 2)
