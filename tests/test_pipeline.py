"""A prompt becomes the images that numpy says, on every engine; and everything that cannot be asked is one clear line."""

import itertools
import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import snoopi_rt
from snoopi_rt.bundle import Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.choice import remember
from snoopi_rt.engines import installed
from snoopi_rt.engines.base import BundleError, EngineError, EngineMissing, InputError, OutputError, TensorSpec
from snoopi_rt.engines.fake import FakeEngine
from snoopi_rt.pipeline import Pipeline, draw_noise

HERE = [name for name in installed() if name != "cuda"]
Functions = dict[str, Callable[..., dict[str, np.ndarray]]]
IDS = {"a red fox": [0, 3, 4, 6, 1], "a cat": [0, 3, 7, 1], "blurry": [0, 8, 1]}


def expected(
    functions: Functions, prompt: str, negative: str | None, scale: float, seed: int, height: int = 16, width: int = 16
) -> np.ndarray:
    """One image by the definition: no batch, no padding, no cache."""

    def states(text: str) -> np.ndarray:
        return functions["text_encoder"](np.array([IDS[text]]))["states"]

    against = np.zeros((1, 1, 4), np.float32) if negative is None else states(negative)
    noise = np.random.RandomState(seed).standard_normal((4, height // 2, width // 2)).astype(np.float32)
    latent = functions["generator"](
        noise=noise[None],
        prompt_states=states(prompt),
        prompt_mask=np.ones((1, states(prompt).shape[1]), bool),
        negative_states=against,
        negative_mask=np.ones((1, against.shape[1]), bool),
        negative_scale=np.array([scale], np.float32),
    )["latent"]
    return functions["decoder"](latent)["image"][0]


def test_the_noise_of_a_seed_never_changes() -> None:
    noise, later = draw_noise(0, (1, 2, 2), steps=1)
    assert noise.dtype == later.dtype == np.float32
    np.testing.assert_array_equal(noise.ravel(), np.array([1.7640524, 0.4001572, 0.978738, 2.2408931], np.float32))
    np.testing.assert_array_equal(later.ravel(), np.array([1.867558, -0.9772779, 0.95008844, -0.1513572], np.float32))


def test_an_image_is_what_the_graphs_say(pipe: Pipeline, functions: Functions) -> None:
    result = pipe.generate("a red fox", "blurry", 0.25, seed=3)
    assert result.images.shape == (1, 16, 16, 3)
    assert result.images.dtype == np.uint8
    np.testing.assert_array_equal(result.images[0], expected(functions, "a red fox", "blurry", 0.25, 3))


@pytest.mark.parametrize("name", HERE)
def test_every_engine_gives_the_same_image_within_one_level(original: Bundle, functions: Functions, name: str) -> None:
    with snoopi_rt.load(original, name) as pipe:
        for seed, (negative, scale) in enumerate([(None, 0.0), ("blurry", 0.5)]):
            image = pipe("a cat", negative, None, seed).images[0]
            difference = np.abs(image.astype(int) - expected(functions, "a cat", negative, scale, seed))
            assert difference.max() <= 1, f"max {difference.max()}, mean {difference.mean()}"
            assert image.std() > 10


@pytest.mark.parametrize("name", HERE)
def test_a_result_says_what_the_engine_really_ran_on(original: Bundle, name: str) -> None:
    with snoopi_rt.load(original, name) as pipe:
        assert pipe("a cat").provider == pipe.provider == {"cpu": "CPUExecutionProvider", "openvino": "CPU f32"}[name]


def test_lists_go_prompt_by_prompt_and_a_batch_changes_no_image(pipe: Pipeline, fakes: dict[str, FakeEngine], functions: Functions) -> None:
    result = pipe.generate(["a red fox", "a cat"], [None, "blurry"], 0.75, seed=[5, 2**32 - 1], n=3, size=(16, 24))
    assert result.prompts == ["a red fox"] * 3 + ["a cat"] * 3
    assert result.negatives == [None] * 3 + ["blurry"] * 3
    assert result.scales == [None] * 3 + [0.75] * 3
    assert result.seeds == [5, 6, 7, 2**32 - 1, 0, 1]
    assert fakes["generator"].calls == 2, "six images are a batch of four and one of two"
    for image, prompt, negative, scale, seed in zip(
        result.images, result.prompts, result.negatives, [0.0] * 3 + [0.75] * 3, result.seeds, strict=True
    ):
        alone = expected(functions, prompt, negative, scale, seed, 16, 24)
        assert np.abs(image.astype(int) - alone).max() <= 1


def test_scale_zero_equals_no_negative(pipe: Pipeline) -> None:
    plain, zero = pipe("a cat", seed=1), pipe("a cat", "blurry", 0, seed=1)
    np.testing.assert_array_equal(plain.images, zero.images)
    assert zero.scales == [0.0]


@pytest.mark.parametrize("off", [None, "", "  "])
def test_an_empty_negative_is_off(pipe: Pipeline, off: str | None) -> None:
    result = pipe("a cat", off, seed=1)
    assert result.negatives == [None]
    assert result.scales == [None]


def test_the_default_scale_is_the_bundles(pipe: Pipeline) -> None:
    assert pipe("a cat", "blurry", seed=1).scales == [0.5]


def test_no_seed_draws_one_that_makes_the_image_again(pipe: Pipeline) -> None:
    first = pipe("a cat")
    assert first.seeds != pipe("a cat").seeds
    np.testing.assert_array_equal(pipe("a cat", seed=first.seeds[0]).images, first.images)


def test_a_seed_beyond_32_bits_wraps(pipe: Pipeline) -> None:
    np.testing.assert_array_equal(pipe("a cat", seed=2**32 + 7).images, pipe("a cat", seed=7).images)


def test_the_text_encoder_is_opened_at_the_first_prompt_that_is_nowhere(original: Bundle, fakes: dict[str, FakeEngine]) -> None:
    opened: list[str] = []

    def open_engine(graph: str) -> FakeEngine:
        opened.append(graph)
        return fakes[graph]

    pipe = Pipeline(original, open_engine, "cpu")
    assert opened == ["generator", "decoder"]
    images = pipe("a cat", "blurry", seed=1).images
    assert opened == ["generator", "decoder", "text_encoder"]
    pipe("a cat", "blurry", seed=2)
    assert fakes["text_encoder"].calls == 2, "one call for the prompt and one for the negative"
    opened.clear()
    again = Pipeline(original, open_engine, "cpu")("a cat", "blurry", seed=1)
    assert opened == ["generator", "decoder"], "the states were on disk"
    np.testing.assert_array_equal(again.images, images)


def test_a_kept_prompt_does_not_wait_for_the_encoder_that_another_thread_opens_once(original: Bundle, fakes: dict[str, FakeEngine]) -> None:
    Pipeline(original, fakes.__getitem__, "cpu")("a cat", seed=1)
    opening, go_on, opened = threading.Event(), threading.Event(), []

    def open_engine(graph: str) -> FakeEngine:
        if graph == "text_encoder":
            opened.append(graph)
            opening.set()
            assert go_on.wait(30)
        return fakes[graph]

    pipe = Pipeline(original, open_engine, "cpu")
    with ThreadPoolExecutor(3) as threads:
        try:
            new = [threads.submit(pipe, prompt, seed=1) for prompt in ("a red fox", "blurry")]
            assert opening.wait(30)
            threads.submit(pipe, "a cat", seed=1).result(10)
            assert not any(each.done() for each in new)
        finally:
            go_on.set()
        assert [len(each.result().images) for each in new] == [1, 1]
    assert opened == ["text_encoder"]


def test_states_on_disk_that_were_cut_short_are_computed_again(pipe: Pipeline, original: Bundle, fakes: dict[str, FakeEngine]) -> None:
    images = pipe("a cat", seed=1).images
    (file,) = (Cache().path / "states").iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    np.testing.assert_array_equal(Pipeline(original, fakes.__getitem__, "cpu")("a cat", seed=1).images, images)
    assert fakes["text_encoder"].calls == 2


def test_it_works_without_a_cache_folder(original: Bundle, fakes: dict[str, FakeEngine], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert len(Pipeline(original, fakes.__getitem__, "cpu", cache=Cache(tmp_path / "file" / "cache"))("a cat").images) == 1


@pytest.mark.parametrize("name", HERE)
def test_many_threads_may_call_one_pipeline(original: Bundle, functions: Functions, name: str) -> None:
    jobs = [(prompt, seed) for seed, prompt in enumerate(itertools.islice(itertools.cycle(["a red fox", "a cat", "blurry"]), 24))]
    with snoopi_rt.load(original, name, threads=1) as pipe, ThreadPoolExecutor(8) as threads:
        for (prompt, seed), result in zip(jobs, threads.map(lambda job: pipe(job[0], "blurry", seed=job[1]), jobs), strict=True):
            assert np.abs(result.images[0].astype(int) - expected(functions, prompt, "blurry", 0.5, seed)).max() <= 1


def test_only_the_inputs_that_the_generator_lists_are_fed(original: Bundle, fakes: dict[str, FakeEngine]) -> None:
    """A generator without masks, with pooled states and with a second step; prompts of two lengths then go one by one."""
    given: list[dict[str, np.ndarray]] = []

    def generate(**arrays: np.ndarray) -> dict[str, np.ndarray]:
        given.append(arrays)
        return {"latent": arrays["noise"]}

    inputs = [spec for spec in fakes["generator"].inputs if not spec.name.endswith("_mask")]
    inputs += [TensorSpec("prompt_pooled", (None, 4), "float32"), TensorSpec("renoise", (None, 1, 4, None, None), "float32")]
    fakes["generator"] = FakeEngine(generate, inputs, fakes["generator"].outputs)
    fakes["text_encoder"] = FakeEngine(
        lambda ids: {"states": np.ones((1, ids.shape[1], 4), np.float32), "pooled": np.full((1, 4), ids.shape[1], np.float32)},
        fakes["text_encoder"].inputs,
        [],
    )
    Pipeline(original, fakes.__getitem__, "cpu")(["a cat", "a cat", "a red fox"], seed=1)
    assert [arrays["prompt_states"].shape for arrays in given] == [(2, 4, 4), (1, 5, 4)]
    assert given[1]["prompt_pooled"].tolist() == [[5.0] * 4]
    noise, later = draw_noise(1, (4, 8, 8), steps=1)
    np.testing.assert_array_equal(given[1]["noise"][0], noise)
    np.testing.assert_array_equal(given[1]["renoise"][0], later)


def test_an_input_that_nobody_knows_is_refused(original: Bundle, fakes: dict[str, FakeEngine]) -> None:
    inputs = [*fakes["generator"].inputs, TensorSpec("depth_map", (None,), "float32")]
    fakes["generator"] = FakeEngine(lambda: {}, inputs, [])
    with pytest.raises(BundleError, match="the generator takes 'depth_map', which this snoopi-rt cannot give"):
        Pipeline(original, fakes.__getitem__, "cpu")("a cat")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_the_latent_is_an_error_and_never_a_picture(original: Bundle, fakes: dict[str, FakeEngine], value: float) -> None:
    def generate(**arrays: np.ndarray) -> dict[str, np.ndarray]:
        latent = arrays["noise"].copy()
        latent[1, 0, 0, 0] = value
        return {"latent": latent}

    fakes["generator"] = FakeEngine(generate, fakes["generator"].inputs, fakes["generator"].outputs)
    with pytest.raises(OutputError, match="generator gave NaN or infinity on engine 'cpu' for seed 8: no picture was made"):
        Pipeline(original, fakes.__getitem__, "cpu")("a cat", seed=7, n=3)
    assert fakes["decoder"].calls == 0


def test_nan_in_the_states_is_an_error_and_is_not_kept(original: Bundle, fakes: dict[str, FakeEngine]) -> None:
    encoder = fakes["text_encoder"]
    fakes["text_encoder"] = FakeEngine(lambda ids: {"states": np.full((1, 4, 4), np.nan, np.float32)}, encoder.inputs, encoder.outputs)
    with pytest.raises(OutputError, match="text_encoder gave NaN or infinity in 'states'"):
        Pipeline(original, fakes.__getitem__, "cpu")("a cat")
    assert Cache().sizes()["states"] == 0


def test_nan_inside_the_decoder_is_an_error_and_never_a_black_picture(original: Bundle, fakes: dict[str, FakeEngine]) -> None:
    def decode(latent: np.ndarray) -> dict[str, np.ndarray]:
        image = np.random.RandomState(0).randint(0, 256, (len(latent), 16, 16, 3)).astype(np.uint8)
        image[1] = 0
        return {"image": image}

    fakes["decoder"] = FakeEngine(decode, fakes["decoder"].inputs, fakes["decoder"].outputs)
    with pytest.raises(OutputError, match="decoder gave one value for all pixels on engine 'cpu' for seed 8: no picture was made"):
        Pipeline(original, fakes.__getitem__, "cpu")("a cat", seed=7, n=3)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt": ""}, "prompt is empty: say what to draw"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": None}, "prompt must be text, got None"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": ["a cat", ""]}, "prompt is empty"),
        ({"prompt": "a a a a a"}, "prompt has 7 tokens, the limit is 6"),
        ({"negative_prompt": "a a a a a"}, "prompt has 7 tokens, the limit is 6"),
        ({"negative_prompt": 3}, "negative prompt must be text, got 3"),
        ({"negative_prompt": "blurry", "negative_scale": math.nan}, "negative scale must be a number from 0.0 to 1.0, got nan"),
        ({"negative_prompt": "blurry", "negative_scale": math.inf}, "negative scale must be a number from 0.0 to 1.0, got inf"),
        ({"negative_prompt": "blurry", "negative_scale": 1.1}, "negative scale must be a number from 0.0 to 1.0, got 1.1"),
        ({"negative_prompt": "blurry", "negative_scale": -0.1}, "negative scale must be a number from 0.0 to 1.0, got -0.1"),
        ({"negative_prompt": "blurry", "negative_scale": True}, "negative scale must be a number from 0.0 to 1.0, got True"),
        ({"negative_prompt": "blurry", "negative_scale": "1"}, "negative scale must be a number from 0.0 to 1.0, got '1'"),
        ({"negative_scale": 0.5}, "negative scale 0.5 without a negative prompt: give both, or neither"),
        ({"negative_scale": 0}, "negative scale 0 without a negative prompt"),
        (
            {"prompt": ["a cat"] * 2, "negative_prompt": ["blurry", None], "negative_scale": [1, 1]},
            "negative scale 1 without a negative prompt",
        ),
        ({"n": 0}, "n must be an integer of at least 1, got 0"),
        ({"n": 1.0}, "n must be an integer of at least 1, got 1.0"),
        ({"n": True}, "n must be an integer of at least 1, got True"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": 1.5}, "seed must be an integer of at least 0, got 1.5"),
        ({"seed": False}, "seed must be an integer of at least 0, got False"),
        ({"size": (32, 32)}, "size 32x32 is not supported, choose from 16x16, 16x24 (height x width)"),
        ({"size": 16}, "size 16 is not supported, choose from 16x16, 16x24"),
        ({"prompt": ["a cat"] * 2, "seed": [1, 2, 3]}, "lists must have one length, got prompt 2, seed 3"),
    ],
)
def test_what_cannot_be_asked_is_one_clear_line(pipe: Pipeline, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        pipe.generate(**{"prompt": "a cat", **asked})
    assert "\n" not in str(caught.value)


def test_a_bundle_without_guidance_refuses_a_negative(original: Bundle, fakes: dict[str, FakeEngine]) -> None:
    bundle = replace(original, guidance=replace(original.guidance, kind="none"))
    pipe = Pipeline(bundle, fakes.__getitem__, "cpu")
    assert pipe("a cat", "").negatives == [None]
    with pytest.raises(InputError, match="negative prompt 'blurry': this bundle was exported without negative prompts"):
        pipe("a cat", "blurry")


def test_an_over_long_prompt_can_be_truncated(pipe: Pipeline) -> None:
    np.testing.assert_array_equal(pipe("a a a a a", seed=1, truncate=True).images, pipe("a a a a", seed=1).images)


def test_timings_tell_the_stages_and_the_total(pipe: Pipeline) -> None:
    timings = pipe("a cat").timings
    assert list(timings) == ["text_encoder", "generator", "decoder", "total"]
    assert 0 < sum(list(timings.values())[:3]) <= timings["total"]


def test_pillow_images_have_the_same_pixels(pipe: Pipeline) -> None:
    result = pipe("a cat", n=2)
    assert [np.asarray(image).tolist() for image in result.pil()] == result.images.tolist()


def test_warmup_opens_every_stage(pipe: Pipeline, fakes: dict[str, FakeEngine]) -> None:
    assert pipe.warmup() is pipe
    assert [fake.calls for fake in fakes.values()] == [1, 1, 1]


def test_a_closed_pipeline_says_so(pipe: Pipeline) -> None:
    with pipe:
        pipe("a cat")
    with pytest.raises(EngineError, match="closed"):
        pipe("a cat")


def test_auto_takes_cpu_first_then_what_was_measured_to_be_fastest(original: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snoopi_rt.choice.installed", lambda: ("cpu", "openvino"))
    choose = snoopi_rt.choice.choose_engine  # type: ignore[attr-defined]
    assert choose(original, Cache()) == "cpu"
    remember(original, Cache(), {"cpu": 0.2})
    remember(original, Cache(), {"openvino": 0.1, "cuda": 0.01})
    assert choose(original, Cache()) == "openvino"
    for damaged in (b"[1]", b"7", b'{"openvino": "fast", "cpu": null}', b"{"):
        Cache().write("measurements", f"{original.hash}.json", damaged)
        assert choose(original, Cache()) == "cpu"
    monkeypatch.setattr("snoopi_rt.choice.installed", lambda: ("openvino",))
    assert choose(replace(original, hash="another"), Cache()) == "openvino"


def test_auto_without_any_engine_says_which_command_installs_one(original: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snoopi_rt.choice.installed", lambda: ())
    monkeypatch.setattr("snoopi_rt.engines.find_spec", lambda name: None)
    with pytest.raises(EngineMissing, match=re.escape('pip install "snoopi-rt[cpu]"')):
        snoopi_rt.load(original)


def test_load_refuses_threads_below_one_and_unknown_engines(original: Bundle) -> None:
    with pytest.raises(InputError, match="threads must be an integer of at least 1, got 0"):
        snoopi_rt.load(original, threads=0)
    with pytest.raises(InputError, match="unknown engine 'gpu', choose from cpu"):
        snoopi_rt.load(original, "gpu")


def test_an_engine_that_the_bundle_does_not_serve_lists_those_that_it_serves(original: Bundle) -> None:
    for precision in (None, "fp32"):
        with pytest.raises(BundleError, match="bundle 'tiny' has no generator for engine 'cuda', it serves cpu, openvino"):
            snoopi_rt.load(original, "cuda", precision)
