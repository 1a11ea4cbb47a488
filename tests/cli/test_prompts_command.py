"""`snoopi-rt prompts`: the prompts of a file are encoded once, and what is wrong in it is named."""

from pathlib import Path

import pytest
from command_line import needs_engine, run
from tiny_bundle import HERE

from snoopi_rt import loading
from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cache import Cache


@needs_engine
def test_prompts_of_a_file_are_encoded_once(original: Bundle, here: Path) -> None:
    (here / "presets.txt").write_bytes("\ufeff# animals\r\na red fox\r\n\r\n  A cat \n#a dog\na cat".encode())
    words = ("prompts", "--bundle", original.folder, "presets.txt", "--engine", HERE[0])
    assert run(*words).stdout == "2 encoded, 1 already cached\n"
    assert run(*words).stdout == "0 encoded, 3 already cached\n"
    encoder = original.folder / "text_encoder.onnx"
    hidden = encoder.rename(here / "hidden.onnx")
    try:
        with loading.open_pipeline(original, HERE[0], None, None, Cache()) as pipe:
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
