"""A bundle is what was saved; its variants are chosen, judged and described."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damaged_bundle import edit, flip_a_byte, generator, refused

from snoopi_rt.bundle.bundle import Bundle, Instruction, Parity, Tile, Variant, Vocabulary
from snoopi_rt.bundle.verify import find_folder
from snoopi_rt.cache import Cache
from snoopi_rt.errors import BundleError, InputError
from snoopi_rt.pipeline import EMBEDDED


def test_what_was_saved_is_what_is_loaded(original: Bundle) -> None:
    assert Bundle.load(original.folder) == original
    assert original.hash == Bundle.load(original.folder).hash != ""


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


def test_a_variant_is_found_by_graph_engine_and_precision(original: Bundle) -> None:
    first = original.variant("generator", "cpu")
    half = replace(first, precision="bf16", engines=("openvino",))
    bundle = with_variants(original, generator=(first, half))
    assert bundle.variant("generator", "openvino") is first
    assert bundle.variant("generator", "openvino", "bf16") is half
    with pytest.raises(InputError, match="bundle 'tiny' has no generator in precision 'bf16' for engine 'cpu', choose from fp32"):
        bundle.variant("generator", "cpu", "bf16")


def test_an_engine_without_a_variant_lists_those_that_are_served(original: Bundle) -> None:
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


def test_the_hash_of_a_variant_changes_with_its_files(original: Bundle) -> None:
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


def test_an_example_that_a_bundle_without_text_encoder_does_not_store_is_refused(prompts_only: Bundle) -> None:
    replace(prompts_only, examples=("A cat ",)).save(prompts_only.folder)
    edit(prompts_only.folder, lambda document: document.update(examples=["a dog"]))
    refused(prompts_only.folder, "the example 'a dog' is no prompt of this bundle")


def test_a_variant_is_judged_by_its_latent_error_where_that_was_measured(original: Bundle) -> None:
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


def test_stored_prompts_are_described(with_prompts: Bundle, prompts_only: Bundle) -> None:
    assert "prompts of up to 6 tokens, with the states of 3 stored\n" in with_prompts.described()
    assert "prompts of up to 6 tokens, with the states of 3 stored, and no text encoder for others\n" in prompts_only.described()


def test_a_bundles_tokenizer_has_its_whole_text_rule(original: Bundle, prompts_only: Bundle) -> None:
    told = replace(original, text=replace(original.text, instruction=Instruction("a red ", 3)))
    np.testing.assert_array_equal(told.open_tokenizer()("FOX"), [[0, 6, 1]])
    with pytest.raises(BundleError, match="has no tokenizer"):
        prompts_only.open_tokenizer()


def test_a_prompt_that_is_not_as_the_text_rule_leaves_it_is_refused(prompts_only: Bundle) -> None:
    for text in ("A cat", " a cat", ""):
        edit(prompts_only.folder, lambda document, text=text: document["prompts"].update(texts=[text]))  # type: ignore[misc]
        refused(prompts_only.folder, f"the prompt {text!r} is not normalized by the text rule")
    for texts in ([], ["a cat", "a cat"]):
        edit(prompts_only.folder, lambda document, texts=texts: document["prompts"].update(texts=texts))  # type: ignore[misc]
        refused(prompts_only.folder, "a bundle with stored prompts must list each of them, once")


def test_damage_in_the_stored_states_is_refused(prompts_only: Bundle) -> None:
    flip_a_byte(prompts_only.folder / "prompts.npz")
    refused(prompts_only.folder, f"{prompts_only.folder / 'prompts.npz'} is damaged or was changed (")


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
