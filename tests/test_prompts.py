"""Prompts are encoded once: what a bundle stores, what is kept, and what may be forgotten."""

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from snoopi_rt.bundle.bundle import Bundle, File
from snoopi_rt.cache import Cache
from snoopi_rt.engines.base import TensorSpec
from snoopi_rt.engines.fake import FakeEngine
from snoopi_rt.errors import BundleError, InputError, OutputError
from snoopi_rt.pipeline import Pipeline
from snoopi_rt.prompt_encoder import PromptEncoder, write_prompts

Fakes = dict[str, FakeEngine]


def kept() -> int:
    folder = Cache().path / "states"
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def refuse(graph: str) -> FakeEngine:
    raise AssertionError(f"{graph} was opened")


def test_stored_states_make_the_image_that_the_text_encoder_makes(
    pipe: Pipeline, prompts_only: Bundle, fakes: Fakes, functions: dict[str, Callable[..., dict[str, np.ndarray]]]
) -> None:
    encoded = pipe("a red fox", "blurry", seed=3).images
    stored = Pipeline(prompts_only, fakes.__getitem__, "cpu")
    calls = fakes["text_encoder"].calls
    np.testing.assert_array_equal(stored("a red fox", "blurry", seed=3).images, encoded)
    assert (stored("a cat", "blurry", seed=3).images != encoded).any()
    assert fakes["text_encoder"].calls == calls


@pytest.mark.parametrize("prompt", ["a cat", "A Cat", "  a cat\n"])
def test_stored_prompts_are_found_by_the_text_after_the_text_rule(prompts_only: Bundle, fakes: Fakes, prompt: str) -> None:
    assert len(Pipeline(prompts_only, fakes.__getitem__, "cpu")(prompt, seed=1).images) == 1


def test_a_bundle_without_text_encoder_names_the_prompts_that_it_knows(prompts_only: Bundle, fakes: Fakes) -> None:
    pipe = Pipeline(prompts_only, fakes.__getitem__, "cpu")
    known = "knows (it has no text encoder): 'a red fox', 'a cat', 'blurry'"
    for asked in ({"prompt": "a dog"}, {"prompt": "a cat", "negative_prompt": "a dog"}):
        with pytest.raises(InputError, match=re.escape(f"prompt 'a dog' is not one of the 3 that bundle 'tiny' {known}")) as caught:
            pipe(**asked)
        assert "\n" not in str(caught.value)


def test_of_many_known_prompts_ten_are_named_and_the_rest_counted(prompts_only: Bundle) -> None:
    states = {f"prompt {number}": {"states": np.zeros((1, 2, 4), np.float32)} for number in range(12)}
    bundle = replace(prompts_only, prompts=write_prompts(prompts_only.folder, states)).save(prompts_only.folder)
    encoder = PromptEncoder(bundle, None, lambda: refuse("text_encoder"), Cache())
    with pytest.raises(InputError, match=r"one of the 12 that .* 'prompt 9' and 2 more$") as caught:
        encoder.encode("a dog")
    assert "'prompt 10'" not in str(caught.value)


def test_stored_prompts_come_before_the_text_encoder_and_others_still_reach_it(with_prompts: Bundle, fakes: Fakes) -> None:
    opened: list[str] = []

    def open_engine(graph: str) -> FakeEngine:
        opened.append(graph)
        return fakes[graph]

    pipe = Pipeline(with_prompts, open_engine, "cpu")
    pipe("a cat", "blurry", seed=1)
    assert opened == ["generator", "decoder"]
    pipe("a blue cat", seed=1)
    assert opened == ["generator", "decoder", "text_encoder"]


def test_every_output_of_the_text_encoder_is_stored(prompts_only: Bundle) -> None:
    states = {"a cat": {"states": np.full((1, 2, 4), 3, np.float32), "pooled": np.full((1, 5), 7, np.float32)}}
    variant = prompts_only.variant("generator", "cpu")
    pooled = replace(variant, inputs=(*variant.inputs, TensorSpec("prompt_pooled", (None, 5), "float32")))
    graphs, prompts = {**prompts_only.graphs, "generator": (pooled,)}, write_prompts(prompts_only.folder, states)
    bundle = replace(prompts_only, prompts=prompts, graphs=graphs).save(prompts_only.folder)
    found = PromptEncoder(bundle, None, lambda: refuse("text_encoder"), Cache()).encode("a cat")
    assert found.keys() == {"states", "pooled"}
    for name, value in states["a cat"].items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == np.float32


def test_the_same_prompts_are_written_as_the_same_bytes(tmp_path: Path) -> None:
    states = {"a cat": {"states": np.ones((1, 2, 4), np.float32)}}
    assert write_prompts(tmp_path, states) == write_prompts(tmp_path, states)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 not a zip", b"\x80\x04K\x01."])
def test_a_prompts_file_that_does_not_hold_them_is_a_bundle_error(prompts_only: Bundle, data: bytes) -> None:
    path = prompts_only.folder / "prompts.npz"
    path.write_bytes(data)
    assert prompts_only.prompts is not None
    bundle = replace(prompts_only, prompts=replace(prompts_only.prompts, file=File.of(path))).save(prompts_only.folder)
    with pytest.raises(BundleError, match=r"cannot read .*prompts.npz: ") as caught:
        PromptEncoder(bundle, None, lambda: refuse("text_encoder"), Cache()).encode("a cat")
    assert "\n" not in str(caught.value)


def test_a_prompts_file_that_lacks_a_prompt_says_which(prompts_only: Bundle) -> None:
    prompts = write_prompts(prompts_only.folder, {"a cat": {"states": np.zeros((1, 2, 4), np.float32)}})
    bundle = replace(prompts_only, prompts=replace(prompts, texts=("a cat", "a dog"))).save(prompts_only.folder)
    with pytest.raises(BundleError, match=r"prompts.npz does not hold the prompt 'a dog'"):
        PromptEncoder(bundle, None, lambda: refuse("text_encoder"), Cache()).encode("a dog")


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((1, 2, 5), np.float32),
        np.zeros((1, 0, 4), np.float32),
        np.zeros((1, 7, 4), np.float32),
        np.zeros((2, 4), np.float32),
        np.zeros((1, 2, 4)),
        np.full((1, 2, 4), np.nan, np.float32),
        np.float32(3),
    ],
)
def test_stored_states_of_another_shape_than_the_generator_takes_are_a_bundle_error(prompts_only: Bundle, value: np.ndarray) -> None:
    prompts = write_prompts(prompts_only.folder, {"a cat": {"states": value}})
    bundle = replace(prompts_only, prompts=prompts).save(prompts_only.folder)
    with pytest.raises(BundleError, match=r"prompts.npz does not hold the prompt 'a cat' as the generator takes it$"):
        PromptEncoder(bundle, None, lambda: refuse("text_encoder"), Cache()).encode("a cat")


def test_stored_states_that_unpack_to_far_more_than_any_prompt_has_are_a_bundle_error(
    prompts_only: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snoopi_rt.prompt_encoder._MAX_BYTES", 100)
    with pytest.raises(BundleError, match=r"cannot read .*prompts.npz: 1.states.npy has more than 100 bytes$"):
        PromptEncoder(prompts_only, None, lambda: refuse("text_encoder"), Cache()).encode("a cat")


def test_kept_prompts_need_no_text_encoder_in_a_later_process(pipe: Pipeline, original: Bundle, fakes: Fakes) -> None:
    assert [pipe.keep("a cat"), pipe.keep(" A cat "), pipe.keep("blurry")] == [True, False, True]
    later = Pipeline(original, lambda graph: refuse(graph) if graph == "text_encoder" else fakes[graph], "cpu")
    assert len(later("a cat", "blurry").images) == 1
    assert not later.keep("a cat")


def test_a_stored_prompt_is_kept_already(with_prompts: Bundle) -> None:
    pipe = Pipeline(with_prompts, refuse, "cpu", low_memory=True)
    assert not pipe.keep("a cat")
    assert kept() == 0


@pytest.mark.parametrize("prompt", ["", "  ", "a a a a a"])
def test_what_cannot_be_a_prompt_cannot_be_kept(pipe: Pipeline, prompt: str) -> None:
    with pytest.raises(InputError, match=r"prompt is empty|prompt has 7 tokens"):
        pipe.keep(prompt)
    assert kept() == 0


def test_states_that_the_cache_does_not_take_are_an_error_and_not_a_promise(original: Bundle, fakes: Fakes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    pipe = Pipeline(original, fakes.__getitem__, "cpu", cache=Cache(tmp_path / "file" / "cache"))
    with pytest.raises(OutputError, match=r"prompt states cannot be kept in .*: it cannot be created"):
        pipe.keep("a cat")


def test_kept_states_belong_to_one_build_one_text_rule_and_one_engine(original: Bundle, fakes: Fakes) -> None:
    """Engines differ in the last bits: a picture is not to depend on which one encoded its prompt before."""

    def new(bundle: Bundle, engine: str = "cpu") -> bool:
        return Pipeline(bundle, fakes.__getitem__, engine).keep("a cat")

    assert new(original)
    assert new(original, "openvino")
    assert not new(original, "openvino")
    (variant,) = original.graphs["text_encoder"]
    other = replace(variant, files=(replace(variant.files[0], sha256="0" * 64),))
    assert new(replace(original, graphs={**original.graphs, "text_encoder": (other,)}))
    assert new(replace(original, text=replace(original.text, max_tokens=5)))
    assert new(replace(original, text=replace(original.text, pad=0)))
    assert not new(original)


def test_memory_for_prompts_is_bounded_and_those_let_go_come_from_disk(
    original: Bundle, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = PromptEncoder(original, original.graphs["text_encoder"][0], lambda: fakes["text_encoder"], Cache()).encode("a red fox")
    limit = 2 * sum(value.nbytes for value in whole.values())
    monkeypatch.setattr("snoopi_rt.prompt_encoder.MAX_BYTES_IN_MEMORY", limit)
    encoder = PromptEncoder(original, original.graphs["text_encoder"][0], lambda: fakes["text_encoder"], Cache())
    asked = ["a cat", "a fox", "a red fox", "a blue cat"]
    first = {prompt: encoder.encode(prompt) for prompt in asked}
    assert 0 < len(encoder._kept) < len(asked)
    assert encoder._bytes == sum(value.nbytes for states in encoder._kept.values() for value in states.values()) <= limit
    calls = fakes["text_encoder"].calls
    for prompt in asked:
        np.testing.assert_array_equal(*(next(iter(states.values())) for states in (first[prompt], encoder.encode(prompt))))
    assert fakes["text_encoder"].calls == calls


def test_kept_states_that_are_not_what_was_written_are_made_again(pipe: Pipeline, original: Bundle, fakes: Fakes) -> None:
    expected, (file,) = pipe("a red fox", seed=1).images, (Cache().path / "states").iterdir()
    pipe("a cat", seed=1)
    (other,) = (path for path in (Cache().path / "states").iterdir() if path != file)
    whole, random = file.read_bytes(), np.random.RandomState(0)
    damaged = [b"", whole[:-1], whole + b"?", other.read_bytes()]
    for _ in range(20):
        flipped = bytearray(whole)
        flipped[random.randint(len(whole))] ^= 1 << random.randint(8)
        damaged.append(bytes(flipped))
    for data in damaged:
        file.write_bytes(data)
        np.testing.assert_array_equal(Pipeline(original, fakes.__getitem__, "cpu")("a red fox", seed=1).images, expected)
        assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "states",
    [np.full((1, 4, 4), np.nan, np.float32), np.zeros((1, 4, 5), np.float32), np.zeros((2, 4, 4), np.float32), np.zeros((1, 4, 4))],
)
def test_kept_states_that_cannot_be_this_builds_are_made_again(pipe: Pipeline, original: Bundle, fakes: Fakes, states: np.ndarray) -> None:
    """The file is whole, its contents are wrong."""
    expected, (file,) = pipe("a red fox", seed=1).images, (Cache().path / "states").iterdir()
    data = io.BytesIO()
    np.save(data, states)
    Cache().write("states", file.name, data.getvalue())
    np.testing.assert_array_equal(Pipeline(original, fakes.__getitem__, "cpu")("a red fox", seed=1).images, expected)


def test_prepared_states_cannot_be_changed(pipe: Pipeline) -> None:
    for prepared in (pipe.prepare("a cat"), pipe.prepare("a cat")):
        with pytest.raises(ValueError, match="read-only"):
            prepared.states["states"][:] = 0
