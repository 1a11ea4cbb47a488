"""Images are written whole or not at all, and say how they were made."""

import json
import os
import shlex
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from snoopi_rt import image
from snoopi_rt.errors import InputError, OutputError
from snoopi_rt.pipeline import Pipeline

PICTURE = np.random.RandomState(0).randint(0, 256, (16, 24, 3)).astype(np.uint8)
METADATA = {
    "prompt": "a „red“ fox; rm -rf ~ 🦊",
    "negative_prompt": "it's blurry",
    "negative_scale": "0.5",
    "seed": "7",
    "size": "16x24",
    "engine": "cpu",
    "bundle": "small",
    "bundle_hash": "0" * 64,
    "snoopi_rt": "0.1.0",
}


@pytest.mark.parametrize("name", ["image.png", "image.jpg", "image.jpeg", "image.webp", "IMAGE.PNG"])
def test_what_was_saved_is_read(tmp_path: Path, name: str) -> None:
    image.save(PICTURE, tmp_path / name, METADATA)
    assert image.read_metadata(tmp_path / name) == METADATA
    with Image.open(tmp_path / name) as opened:
        assert opened.size == (24, 16)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_png_keeps_every_pixel_and_a_text_for_each_key(tmp_path: Path) -> None:
    image.save(PICTURE, tmp_path / "image.png", METADATA)
    with Image.open(tmp_path / "image.png") as opened:
        np.testing.assert_array_equal(np.asarray(opened), PICTURE)
        assert opened.info["prompt"] == METADATA["prompt"]


def test_an_existing_file_is_replaced_only_with_force(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_text("mine")
    with pytest.raises(InputError, match=r"image.png already exists: choose another name, or replace it with --force"):
        image.save(PICTURE, tmp_path / "image.png", METADATA)
    assert (tmp_path / "image.png").read_text() == "mine"
    image.save(PICTURE, tmp_path / "image.png", METADATA, "replace")
    assert image.read_metadata(tmp_path / "image.png") == METADATA


def test_an_unknown_ending_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in .png, .jpg, .jpeg, .webp"):
        image.save(PICTURE, tmp_path / "image.gif", METADATA)


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*: .*file is not a folder"):
        image.save(PICTURE, tmp_path / "file" / "image.png", METADATA)
    with pytest.raises(OutputError, match=r"cannot write .*folder.png: it is a folder"):
        image.save(PICTURE, tmp_path / "folder.png", METADATA, "replace")
    for path in (tmp_path / f"{'x' * 252}.png", tmp_path / "new" / ("x" * 300) / "image.png", Path(*["x" * 200] * 25, "image.png")):
        with pytest.raises(OutputError, match=r"cannot write .*: File name too long"):
            image.check_writable(path)


def test_the_longest_legal_name_is_written(tmp_path: Path) -> None:
    path = tmp_path / f"{'ü' * 125}x.png"  # 255 bytes
    assert image.save(PICTURE, path, METADATA) == path
    assert image.read_metadata(path) == METADATA


def test_a_missing_folder_is_made_and_a_taken_name_counted_up(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "image.png"
    names = [image.save(PICTURE, path, METADATA, "count").name for _ in range(3)]
    assert names == ["image.png", "image-2.png", "image-3.png"] == sorted((found.name for found in path.parent.iterdir()), key=len)


def test_a_file_that_appears_while_the_image_is_drawn_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    monkeypatch.setattr(image, "encode", lambda *given: path.write_text("mine") and b"image")
    with pytest.raises(InputError, match="already exists"):
        image.save(PICTURE, path, METADATA)
    monkeypatch.setattr("os.link", _no_links)
    with pytest.raises(InputError, match="already exists"):
        image.save(PICTURE, path, METADATA)
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


def _no_links(source: Path, path: Path) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_metadata_that_a_jpeg_cannot_hold_is_one_line(tmp_path: Path) -> None:
    long = {**METADATA, "prompt": "fox " * 20_000}
    with pytest.raises(OutputError, match=r"^cannot write .*image.jpg: jpeg cannot hold it \(.*\): use png$"):
        image.save(PICTURE, tmp_path / "image.jpg", long)
    assert list(tmp_path.iterdir()) == []
    for name in ("image.png", "image.webp"):
        image.save(PICTURE, tmp_path / name, long)
        assert image.read_metadata(tmp_path / name) == long


def test_a_file_that_is_no_image_and_an_image_of_others_are_input_errors(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(InputError, match=r"text.png cannot be read"):
        image.read_metadata(tmp_path / "text.png")
    for name in ("other.png", "other.jpg"):
        Image.fromarray(PICTURE).save(tmp_path / name)
        with pytest.raises(InputError, match=f"{name} has no metadata of snoopi-rt"):
            image.read_metadata(tmp_path / name)
    exif = Image.Exif()
    exif[image.DESCRIPTION] = "my holiday"
    Image.fromarray(PICTURE).save(tmp_path / "holiday.jpg", exif=exif)
    with pytest.raises(InputError, match=r"holiday.jpg has no metadata of snoopi-rt"):
        image.read_metadata(tmp_path / "holiday.jpg")


def test_an_image_of_a_stranger_is_one_line_whatever_is_in_it(tmp_path: Path) -> None:
    def described(name: str, text: str | bytes) -> Path:
        exif = Image.Exif()
        exif[image.DESCRIPTION] = text
        Image.fromarray(PICTURE).save(tmp_path / name, exif=exif)
        return tmp_path / name

    image.save(PICTURE, tmp_path / "ours.png", METADATA)
    bomb = bytearray((tmp_path / "ours.png").read_bytes())
    bomb[16:24] = (2**31 - 1).to_bytes(4, "big") * 2  # width and height
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bomb)
    Image.fromarray(PICTURE).save(tmp_path / "other.tiff")
    Image.fromarray(PICTURE).save(tmp_path / "other.gif")
    (tmp_path / "sparse.webp").touch()
    os.truncate(tmp_path / "sparse.webp", 20 * 2**30)
    os.mkfifo(tmp_path / "pipe.png")
    described("deep.jpg", "[" * 20_000 + "]" * 20_000)
    described("surrogate.jpg", json.dumps({**METADATA, "prompt": "\ud800"}))
    described("digits.webp", '{"snoopi_rt": ' + "9" * 5000 + "}")
    described("bytes.jpg", b"\xff\x00\xfe")
    described("list.webp", '["snoopi_rt"]')
    for name in sorted(path.name for path in tmp_path.iterdir() if path.name != "ours.png"):
        with pytest.raises(InputError, match=r"cannot be read: |has no metadata of snoopi-rt") as caught:
            image.read_metadata(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_the_command_is_quoted_for_the_shell() -> None:
    words = shlex.split(image.command(METADATA, None))
    assert words[:2] == ["snoopi-rt", "generate"]
    assert words[2] == METADATA["prompt"]
    assert words[words.index("--neg") + 1] == "it's blurry"
    assert "--bundle" not in words


def test_the_command_names_a_foreign_bundle() -> None:
    words = shlex.split(image.command({**METADATA, "bundle": "other", "truncate": "yes"}, "my bundles/other"))
    assert words[words.index("--bundle") + 1] == "my bundles/other"
    assert "--truncate" in words


def test_a_results_metadata_is_text_and_leaves_out_what_was_not_given(pipe: Pipeline) -> None:
    plain = pipe("a cat", seed=3).metadata(0)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["seed"] == "3"
    assert plain["size"] == "16x16"
    assert not {"negative_prompt", "negative_scale", "truncate"} & plain.keys()
    assert pipe("a cat", "blurry", 0, seed=3).metadata(0)["negative_scale"] == "0.0"
