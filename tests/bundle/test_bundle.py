"""A bundle is loaded when the folder keeps every promise of its bundle.json, and refused with one clear line otherwise."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from snoopi_rt.bundle import onnx_file, verify
from snoopi_rt.bundle.bundle import Bundle, File, Parity, Tile, Variant, Vocabulary
from snoopi_rt.bundle.onnx_file import embedded_tokens, external_data
from snoopi_rt.bundle.verify import find_folder
from snoopi_rt.cache import Cache
from snoopi_rt.errors import BundleError, InputError
from snoopi_rt.pipeline import EMBEDDED


def refused(folder: Path, message: str) -> None:
    with pytest.raises(BundleError, match=re.escape(message)) as caught:
        Bundle.load(folder)
    assert "\n" not in str(caught.value)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((folder / "bundle.json").read_text())
    change(document)
    (folder / "bundle.json").write_text(json.dumps(document))


def generator(document: dict[str, Any]) -> dict[str, Any]:
    return document["graphs"]["generator"][0]


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_was_saved_is_what_is_loaded(original: Bundle) -> None:
    assert Bundle.load(original.folder) == original
    assert original.hash == Bundle.load(original.folder).hash != ""


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


def test_a_missing_file_is_refused(folder: Path) -> None:
    (folder / "decoder.onnx").unlink()
    refused(folder, f"{folder / 'decoder.onnx'} is missing")


@pytest.mark.parametrize("name", ["tokenizer.json", "generator.onnx"])
def test_a_flipped_byte_is_refused(folder: Path, name: str) -> None:
    Bundle.load(folder)
    flip_a_byte(folder / name)
    refused(folder, f"{folder / name} is damaged: its SHA-256 is not the one in bundle.json")


def test_a_file_of_another_size_is_refused(folder: Path) -> None:
    with open(folder / "generator.onnx", "ab") as file:
        file.write(b"x")
    refused(folder, f"{folder / 'generator.onnx'} is damaged: ")


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


# The last one is a number without end, which took time quadratic in its length.
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


def test_saving_refuses_files_that_are_not_there_and_leaves_no_manifest(original: Bundle, folder: Path) -> None:
    (folder / "bundle.json").unlink()
    (folder / "decoder.onnx").unlink()
    with pytest.raises(BundleError, match=r"decoder.onnx is missing"):
        original.save(folder)
    assert not (folder / "bundle.json").exists()


def test_saving_leaves_nothing_beside_the_bundle(original: Bundle, folder: Path) -> None:
    before = sorted(folder.iterdir())
    original.save(folder)
    assert sorted(folder.iterdir()) == before


def with_variants(bundle: Bundle, **variants: tuple[Variant, ...]) -> Bundle:
    return replace(bundle, graphs={**bundle.graphs, **variants})


def test_a_build_is_found_by_graph_engine_and_precision(original: Bundle) -> None:
    first = original.variant("generator", "cpu")
    half = replace(first, precision="bf16", engines=("openvino",))
    bundle = with_variants(original, generator=(first, half))
    assert bundle.variant("generator", "openvino") is first
    assert bundle.variant("generator", "openvino", "bf16") is half
    with pytest.raises(InputError, match="bundle 'tiny' has no generator in precision 'bf16' for engine 'cpu', choose from fp32"):
        bundle.variant("generator", "cpu", "bf16")


def test_an_engine_without_a_build_lists_those_that_are_served(original: Bundle) -> None:
    bundle = with_variants(original, decoder=(replace(original.variant("decoder", "cpu"), engines=("cpu",)),))
    assert bundle.engines() == ("cpu",)
    with pytest.raises(BundleError, match="bundle 'tiny' has no decoder for engine 'openvino', it supports cpu"):
        bundle.variant("decoder", "openvino")
    with pytest.raises(BundleError, match="bundle 'tiny' has no generator for engine 'cuda', it supports cpu"):
        bundle.variant("generator", "cuda", "fp32")


def test_a_text_encoder_for_cpu_alone_serves_every_engine_of_the_other_graphs(original: Bundle) -> None:
    variant = replace(original.variant("text_encoder", "cpu"), engines=("cpu",))
    bundle = with_variants(original, text_encoder=(variant,))
    assert bundle.engines() == original.engines() == ("cpu", "openvino")
    assert bundle.variant("text_encoder", "openvino") is variant
    own = replace(variant, engines=("openvino",), precision="bf16")
    assert with_variants(original, text_encoder=(variant, own)).variant("text_encoder", "openvino") is own
    for graph in ("generator", "decoder"):
        narrow = with_variants(original, **{graph: (replace(original.variant(graph, "cpu"), engines=("cpu",)),)})
        assert narrow.engines() == ("cpu",)


def test_the_hash_of_a_build_changes_with_its_files(original: Bundle) -> None:
    variant = original.variant("text_encoder", "cpu")
    assert variant.hash != replace(variant, files=(replace(variant.files[0], sha256="0" * 64),)).hash


@pytest.mark.parametrize("absent", ["prompts", "tile"])
def test_a_manifest_from_before_a_field_was_there_is_read(original: Bundle, folder: Path, absent: str) -> None:
    def older(document: dict[str, Any]) -> None:
        document["format"] = 1
        del document["vocabulary"], document["examples"]
        del document[absent], document["text"]["pad"], generator(document)["max_batch"]
        for graph in document["graphs"].values():
            graph[0]["parity"] = {"relative_l2": 0.0, "max_abs": 0.0}

    edit(folder, older)
    assert replace(Bundle.load(folder), folder=original.folder, hash=original.hash) == original


def test_the_words_and_examples_of_format_2_are_read_strictly(original: Bundle, folder: Path) -> None:
    vocabulary = Vocabulary({"cat": ("kitten",), "fox": ()}, colours=("red", "blue"), counts=("two",))
    told = replace(original, vocabulary=vocabulary, examples=("a red fox", "a cat")).save(folder)
    assert Bundle.load(folder) == told and told.vocabulary == vocabulary
    assert "draws 2 objects: --vocabulary lists them\nexamples: 'a red fox', 'a cat'\n" in told.described()
    for change, message in (
        ({"examples": "a cat"}, 'key examples must be a list, got "a cat"'),
        ({"examples": ["a cat", " "]}, "the example ' ' is no prompt of this bundle"),
        ({"vocabulary": {"objects": {"cat": "kitten"}}}, 'key vocabulary.objects.cat must be a list, got "kitten"'),
        ({"vocabulary": {"objects": {}}}, "a vocabulary needs objects"),
        (
            {"vocabulary": {"objects": {"cat": []}, "related": {"dog": "wolf"}}},
            "words are related to 'dog', which is not an object of the vocabulary",
        ),
        ({"vocabulary": {"objects": {"cat": [" kitten"]}}}, "a word of the vocabulary is empty or not stripped"),
        ({"vocabulary": {"objects": {"cat": []}, "colors": []}}, "unknown key vocabulary.colors"),
        ({"format": 1}, "unknown key vocabulary in format 1"),
    ):
        told.save(folder)
        edit(folder, lambda document, change=change: document.update(change))  # type: ignore[misc]
        refused(folder, message)


def test_an_example_that_a_bundle_without_text_encoder_does_not_carry_is_refused(prompts_only: Bundle) -> None:
    replace(prompts_only, examples=("A cat ",)).save(prompts_only.folder)
    edit(prompts_only.folder, lambda document: document.update(examples=["a dog"]))
    refused(prompts_only.folder, "the example 'a dog' is no prompt of this bundle")


def test_a_build_is_judged_by_its_latent_error_where_that_was_measured(original: Bundle) -> None:
    variant = original.variant("generator", "cpu")
    judged = replace(variant, parity=Parity(relative_l2=0.5, max_abs=9.0, latent_error=0.04), tolerance=0.05)
    assert judged.parity.error == 0.04
    assert Parity(relative_l2=0.03, max_abs=9.0, psnr=40.0).error == 0.01
    for beyond in (0.06, float("nan")):
        with pytest.raises(BundleError, match=r"\(latent error\) off PyTorch, beyond its tolerance 0.05"):
            replace(judged, parity=Parity(0.0, 0.0, beyond))


def test_everything_measured_is_described(original: Bundle) -> None:
    variant = original.variant("generator", "cpu")
    bundle = with_variants(
        replace(original, tile=Tile(8, 2)),
        generator=(replace(variant, precision="int8", parity=Parity(2e-2, 1.0, 0.041), tolerance=0.05, max_batch=1),),
        decoder=(replace(original.variant("decoder", "cpu"), parity=Parity(1e-5, 1.0, psnr=48.25), tolerance=0.01),),
    )
    said = bundle.described()
    assert "int8 for cpu, openvino (onnx, 0.0 MB, up to 1 at once), latent error 0.041 of 0.05 allowed, relative L2 0.02\n" in said
    assert "MB), RMS of full white 0.0039 of 0.01 allowed, relative L2 1e-05, PSNR 48.2 dB\n" in said
    assert "decoded in tiles of 16x16 that overlap by 4 pixels" in said


def test_carried_prompts_are_described(carrying: Bundle, prompts_only: Bundle) -> None:
    assert "prompts of up to 6 tokens, with the states of 3 included\n" in carrying.described()
    assert "prompts of up to 6 tokens, with the states of 3 included, and no text encoder for others\n" in prompts_only.described()


def test_a_prompt_that_is_not_as_the_text_rule_leaves_it_is_refused(prompts_only: Bundle) -> None:
    for text in ("A cat", " a cat", ""):
        edit(prompts_only.folder, lambda document, text=text: document["prompts"].update(texts=[text]))  # type: ignore[misc]
        refused(prompts_only.folder, f"the prompt {text!r} is not normalized by the text rule")
    for texts in ([], ["a cat", "a cat"]):
        edit(prompts_only.folder, lambda document, texts=texts: document["prompts"].update(texts=texts))  # type: ignore[misc]
        refused(prompts_only.folder, "a bundle that includes prompts must list each of them, once")


def test_damage_in_the_carried_states_is_refused(prompts_only: Bundle) -> None:
    flip_a_byte(prompts_only.folder / "prompts.npz")
    refused(prompts_only.folder, f"{prompts_only.folder / 'prompts.npz'} is damaged: ")


def test_a_bundles_folder_is_found_again_by_its_hash(
    original: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache()
    for place in (original.folder, folder):
        Bundle.load(place)
    monkeypatch.chdir(tmp_path)
    assert find_folder(original.hash, cache) == folder
    (folder / "bundle.json").unlink()
    assert find_folder(original.hash, cache) == original.folder
    for path in (cache.path / "bundles").iterdir():
        path.write_text('["/nowhere", "\\u0000"]')
    assert find_folder(original.hash, cache) is None is find_folder("../hashes/x", cache)


def test_the_embedded_bundle_keeps_every_promise_and_has_examples() -> None:
    embedded = Bundle.load(EMBEDDED)
    embedded.verify()
    assert embedded.vocabulary is not None and len(embedded.examples) >= 8
