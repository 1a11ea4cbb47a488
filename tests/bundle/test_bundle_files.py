"""The files of a bundle are those that bundle.json promises, or it is refused in one clear line."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from damaged_bundle import edit, flip_a_byte, generator, refused
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from snoopi_rt.bundle import onnx_file, verify
from snoopi_rt.bundle.bundle import Bundle, File
from snoopi_rt.bundle.onnx_file import embedded_tokens, external_data
from snoopi_rt.cache import Cache
from snoopi_rt.errors import BundleError


def test_a_missing_file_is_refused(folder: Path) -> None:
    (folder / "decoder.onnx").unlink()
    refused(folder, f"{folder / 'decoder.onnx'} is missing")


@pytest.mark.parametrize("name", ["tokenizer.json", "generator.onnx"])
def test_a_flipped_byte_is_refused(folder: Path, name: str) -> None:
    Bundle.load(folder)
    flip_a_byte(folder / name)
    refused(folder, f"{folder / name} is damaged or was changed (its SHA-256 is not the one in bundle.json): export or download it")


def test_a_file_of_another_size_is_refused(folder: Path) -> None:
    size = (folder / "generator.onnx").stat().st_size
    with open(folder / "generator.onnx", "ab") as file:
        file.write(b"x")
    remedy = "export or download it again, or update size and sha256 in bundle.json if you changed it"
    refused(folder, f"{folder / 'generator.onnx'} is damaged or was changed ({size + 1} bytes instead of {size}): {remedy}")


def test_a_record_of_size_times_and_inode_is_trusted_until_verify(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.load(folder)
    monkeypatch.setattr(verify, "sha256", lambda path: "another")
    Bundle.load(folder)
    with pytest.raises(BundleError, match=r"is damaged"):
        bundle.verify()


def test_a_file_that_only_pretends_to_be_as_old_is_hashed(folder: Path) -> None:
    bundle = Bundle.load(folder)
    status = (folder / "decoder.onnx").stat()
    flip_a_byte(folder / "decoder.onnx")
    os.utime(folder / "decoder.onnx", ns=(status.st_atime_ns, status.st_mtime_ns))
    refused(folder, "decoder.onnx is damaged")
    with pytest.raises(BundleError, match=r"decoder.onnx is damaged"):
        bundle.check_again(bundle.graphs["decoder"][0].files)
    flip_a_byte(folder / "decoder.onnx")
    bundle.check_again(bundle.graphs["decoder"][0].files)


@pytest.mark.parametrize("record", [b"", b"[", b"{}", b"[1]", b"null", b"\xff"])
def test_a_damaged_record_of_a_hash_counts_as_none(folder: Path, record: bytes) -> None:
    Bundle.load(folder)
    for path in (Cache().path / "hashes").iterdir():
        path.write_bytes(record)
    flip_a_byte(folder / "decoder.onnx")
    refused(folder, "decoder.onnx is damaged")
    flip_a_byte(folder / "decoder.onnx")
    Bundle.load(folder)


@pytest.mark.parametrize("name", ["bundle.json", "decoder.onnx"])
def test_a_symbolic_link_is_refused(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    refused(folder, f"{folder / name} is a symbolic link")


def test_a_folder_in_the_place_of_a_file_is_refused(folder: Path) -> None:
    (folder / "decoder.onnx").unlink()
    (folder / "decoder.onnx").mkdir()
    refused(folder, f"{folder / 'decoder.onnx'} is not a file")


def with_external_data(path: Path, location: str) -> None:
    """Write an ONNX file whose only weight is said to lie in another file."""
    weight = numpy_helper.from_array(np.zeros(4, np.float32), "weight")
    external_data_helper.set_external_data(weight, location)
    weight.data_location = TensorProto.EXTERNAL
    weight.ClearField("raw_data")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    branch = helper.make_graph([helper.make_node("Constant", [], ["inner"], value=weight)], "branch", [], [out])
    nodes = [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "main", [value], [out])), path)


def test_external_data_is_found_inside_branches(tmp_path: Path) -> None:
    with_external_data(tmp_path / "model.onnx", "weights.bin")
    assert external_data(tmp_path / "model.onnx") == ["weights.bin"]


def test_a_model_without_external_data_names_none(original: Bundle) -> None:
    assert external_data(original.folder / "generator.onnx") == []


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "weights.bin"])
def test_external_data_that_is_not_listed_is_refused(folder: Path, location: str) -> None:
    with_external_data(folder / "generator.onnx", location)
    entry = File.of(folder / "generator.onnx")
    edit(folder, lambda document: generator(document)["files"][0].update(sha256=entry.sha256, size=entry.size))
    refused(folder, f"{folder / 'generator.onnx'} reads {location!r}, which its variant does not list")


def test_external_data_that_is_listed_is_loaded(folder: Path) -> None:
    with_external_data(folder / "generator.onnx", "weights.bin")
    (folder / "weights.bin").write_bytes(bytes(16))
    files = [vars(File.of(folder / name)) for name in ("generator.onnx", "weights.bin")]
    edit(folder, lambda document: generator(document).update(files=files))
    assert len(Bundle.load(folder).variant("generator", "cpu").files) == 2


# The last one is a number without end: to add up all of it takes time quadratic in its length.
@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"\x3a\xff\xff\x03", b"\x80" * 2**22])
def test_a_file_that_is_no_onnx_is_refused(folder: Path, data: bytes) -> None:
    (folder / "generator.onnx").write_bytes(data)
    entry = File.of(folder / "generator.onnx")
    edit(folder, lambda document: generator(document)["files"][0].update(sha256=entry.sha256, size=entry.size))
    refused(folder, f"{folder / 'generator.onnx'} is not an ONNX file")


def test_a_graph_that_looks_nothing_up_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Gather", ["table"], ["states"])
    onnx.save(helper.make_model(helper.make_graph([node], "main", [], [])), tmp_path / "model.onnx")
    with pytest.raises(BundleError, match=r"model.onnx is not an ONNX file"):
        embedded_tokens(tmp_path / "model.onnx")


def test_a_graph_that_is_cut_short_while_it_is_read_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x3a\xff\xff\x03" + bytes(2**16))
    with pytest.raises(BundleError, match=r"model.onnx is not an ONNX file"), onnx_file._opened(path) as data:
        assert (len(data), data[0]) == (2**16 + 4, 0x3A)
        path.write_bytes(b"")
        _ = data[2**16 + 1]
