"""bundle.json is what the documents say, and a wrong one is refused in one clear line."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damaged_bundle import edit, generator, refused

from snoopi_rt.bundle.bundle import Bundle


def test_the_manifest_is_the_documented_json(original: Bundle) -> None:
    document = json.loads((original.folder / "bundle.json").read_text())
    assert document["format"] == 2
    assert document["snoopi_rt"] == "0.1.0"
    assert document["sizes"] == [[16, 16], [16, 24]]
    assert document["text"].items() >= {"max_tokens": 6, "lowercase": True, "pad": None}.items()
    assert document["prompts"] is document["tile"] is generator(document)["max_batch"] is None
    assert generator(document)["parity"] == {"relative_l2": 0.0, "max_abs": 0.0, "latent_error": None, "psnr": None}
    assert document["guidance"] == {"kind": "nasa", "scale": {"default": 0.5, "min": 0.0, "max": 1.0}, "fixed": {}}
    assert generator(document)["files"][0].keys() == {"path", "sha256", "size"}
    assert generator(document)["inputs"][0] == {"name": "noise", "shape": [None, 4, None, None], "dtype": "float32"}
    assert not {"folder", "hash"} & document.keys()


def test_no_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", f"no bundle at {tmp_path / 'nothing'}: no such folder")


def test_a_folder_without_a_manifest_is_refused(folder: Path) -> None:
    (folder / "bundle.json").unlink()
    refused(folder, f"no bundle at {folder}: it has no bundle.json")


def test_a_git_lfs_pointer_in_the_place_of_a_model_is_named_as_such(folder: Path) -> None:
    (folder / "decoder.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 12345\n")
    refused(folder, f"{folder / 'decoder.onnx'} is a git-lfs pointer, not the file itself: run `git lfs pull` in its clone")


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_manifest_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / "bundle.json").write_text(text, encoding="latin-1")
    refused(folder, f"{folder / 'bundle.json'}: ")


def test_a_newer_format_names_the_version_that_reads_it(folder: Path) -> None:
    edit(folder, lambda document: document.update(format=3, snoopi_rt="0.7.0", unheard_of=True))
    refused(folder, "format 3 is newer than this snoopi-rt, which reads 1 and 2; 0.7.0 does: git pull, then pip install .")


def test_a_manifest_without_end_is_refused_at_once(folder: Path) -> None:
    (folder / "bundle.json").unlink()
    os.mkfifo(folder / "bundle.json")
    refused(folder, f"cannot read {folder / 'bundle.json'}: it is a pipe or a device, not a file")
    (folder / "bundle.json").unlink()
    (folder / "bundle.json").touch()
    os.truncate(folder / "bundle.json", 20 * 2**30)
    refused(folder, f"cannot read {folder / 'bundle.json'}: it has more than 16777216 bytes")
    (folder / "bundle.json").write_bytes(b'{"format": 1' + b"0" * 400 + b"}")
    refused(folder, "the number 1000000000... has 401 digits, at most 40 are read")
    refused(Path("x" * 300), "File name too long")


@pytest.mark.parametrize("number", [None, 0, "1", True, 1.0, 2.0])
def test_an_unknown_format_is_refused(folder: Path, number: Any) -> None:
    edit(folder, lambda document: document.update(format=number))
    refused(folder, f"unknown format {number!r}, this snoopi-rt reads 1 and 2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("name"), "it has no key name"),
        (lambda d: d.update(nmae="x"), "unknown key nmae"),
        (lambda d: d.update(name=7), "key name must be a string, got 7"),
        (lambda d: d.update(text=None), "key text must be an object, got null"),
        (lambda d: d["text"].update(lowercase=1), "key text.lowercase must be true or false, got 1"),
        (lambda d: d["latent"].update(channels=True), "key latent.channels must be an integer, got true"),
        (lambda d: d["text"].update(pad="x"), 'key text.pad must be an integer or null, got "x"'),
        (lambda d: d["text"].update(tokenizer=7), "key text.tokenizer must be an object or null, got 7"),
        (lambda d: d["text"].update(tokenizer=None), "a bundle has a text_encoder and a tokenizer, or neither and prompts"),
        (lambda d: d["graphs"].pop("text_encoder"), "the graphs must be text_encoder, generator, decoder, not generator, decoder"),
        (
            lambda d: d.update(prompts={"file": d["text"]["tokenizer"], "texts": ["a"]}),
            "prompts must be in an .npz file, not tokenizer.json",
        ),
        (lambda d: d.update(tile={"size": 8, "overlap": 8}), "tiles of 8 latent pixels cannot overlap by 8"),
        (lambda d: d.update(tile={"size": 8}), "it has no key tile.overlap"),
        (lambda d: generator(d)["files"][0].update(sha256="../../a\0"), "generator.onnx: '../../a\\x00' is not a SHA-256 in hexadecimal"),
        (lambda d: generator(d).update(max_batch=0), "generator.onnx: max_batch must be positive"),
        (lambda d: d["guidance"].update(kind="a b"), "the guidance 'a b' is not a plain name"),
        (lambda d: d["guidance"]["scale"].update(max=float("nan")), "NaN is not a number"),
        (lambda d: d["guidance"]["scale"].update(default=3), "scale 3.0 is outside 0.0 to 1.0"),
        (lambda d: d.update(sizes=[[16]]), "key sizes[0] must be a list of 2"),
        (lambda d: d.update(sizes=16), "key sizes must be a list, got 16"),
        (lambda d: d.update(provenance={"seed": 1}), "key provenance.seed must be a string, got 1"),
        (lambda d: d.update(sizes=[]), "every size must be a multiple of 2"),
        (lambda d: d.update(sizes=[[16, 17]]), "every size must be a multiple of 2"),
        (lambda d: d.update(max_batch=0), "max_batch must be positive and at most 4096, got 0"),
        (lambda d: d.update(max_batch=2**63), f"max_batch must be positive and at most 4096, got {2**63}"),
        (lambda d: d.update(sizes=[[2**63, 16]]), f"a side of a size must be from 0 to 32768, got {2**63}"),
        (lambda d: d["latent"].update(channels=2**63), f"channels must be positive and at most 4096, got {2**63}"),
        (lambda d: d["text"].update(max_tokens=-1), "max_tokens must be positive and at most 131072, got -1"),
        (lambda d: d["text"].update(pad=-1), "pad must be from 0 to 2147483647, got -1"),
        (lambda d: generator(d)["inputs"][0].update(shape=[2**63]), "generator.onnx: noise has an impossible shape"),
        (lambda d: generator(d)["parity"].update(psnr=-1e6), "psnr -1000000.0 is not a plausible number of dB"),
        (lambda d: d.update(provenance={"x": [[]] * 3 + [{"y": [[[]]]}]}), "key provenance.x must be a string"),
        (lambda d: d["graphs"].pop("decoder"), "the graphs must be text_encoder, generator, decoder, not text_encoder, generator"),
        (lambda d: d["graphs"].update(decoder=[]), "every graph needs a variant"),
        (
            lambda d: generator(d)["inputs"][0].update(shape=["B"]),
            'key graphs.generator[0].inputs[0].shape[0] must be an integer or null, got "B"',
        ),
        (lambda d: generator(d)["inputs"].append(generator(d)["inputs"][0]), "a variant lists the same input twice: noise, "),
        (
            lambda d: generator(d)["files"].append(generator(d)["files"][0]),
            "a variant lists the same file twice: generator.onnx, generator.onnx",
        ),
        (lambda d: generator(d)["files"][0].update(path="decoder.onnx"), "decoder.onnx is listed twice with different contents"),
        (lambda d: generator(d).update(format="openvino-ir"), "an openvino-ir variant must list an .xml file and its .bin"),
        (
            lambda d: generator(d)["parity"].update(relative_l2=0.5),
            "generator.onnx is 0.5 (relative L2) off PyTorch, beyond its tolerance 0.0001",
        ),
        (
            lambda d: generator(d)["parity"].update(latent_error=0.2),
            "generator.onnx is 0.2 (latent error) off PyTorch, beyond its tolerance 0.0001",
        ),
        (
            lambda d: generator(d)["parity"].update(psnr="high"),
            'key graphs.generator[0].parity.psnr must be a finite number or null, got "high"',
        ),
    ],
)
def test_a_wrong_manifest_says_where(folder: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit(folder, change)
    refused(folder, message)


@pytest.mark.parametrize(
    "path", ["../generator.onnx", "/etc/passwd", "sub/generator.onnx", "..", ".", "", "C:x", "a\\b", "bundle.json", "a\x00b"]
)
def test_a_path_that_leaves_the_folder_is_refused(folder: Path, path: str) -> None:
    edit(folder, lambda document: generator(document)["files"][0].update(path=path))
    refused(folder, f"{path!r} is not a plain file name inside the bundle")
