"""A prompt becomes the images that numpy says, on every engine; and everything that cannot be asked is one clear line."""

import itertools
import math
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import snoopi_rt
from snoopi_rt import pipeline
from snoopi_rt.bundle.bundle import GRAPHS, Bundle, Tile
from snoopi_rt.cache import Cache
from snoopi_rt.engines import installed
from snoopi_rt.engines.base import TensorSpec
from snoopi_rt.engines.fake import FakeEngine
from snoopi_rt.errors import BundleError, EngineError, EngineMissing, InputError, OutputError
from snoopi_rt.pipeline import Pipeline
from snoopi_rt.runtime.auto_engine import Measurement, remember
from snoopi_rt.runtime.inputs import draw_noise

HERE = [name for name in installed() if name in ("cpu", "openvino")]
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
    result = pipe.generate(["a red fox", "a cat"], [None, "blurry"], 0.75, seed=[5, 2**32 - 3], n=3, size=(16, 24))
    assert [request.prompt for request in result.requests] == ["a red fox"] * 3 + ["a cat"] * 3
    assert [request.negative_prompt for request in result.requests] == [None] * 3 + ["blurry"] * 3
    assert [request.negative_scale for request in result.requests] == [None] * 3 + [0.75] * 3
    assert result.seeds == [5, 6, 7, 2**32 - 3, 2**32 - 2, 2**32 - 1]
    assert fakes["generator"].calls == 2, "six images are a batch of four and one of two"
    for image, request in zip(result.images, result.requests, strict=True):
        scale = request.negative_scale or 0.0
        alone = expected(functions, request.prompt, request.negative_prompt, scale, request.seed, 16, 24)
        assert np.abs(image.astype(int) - alone).max() <= 1


def test_scale_zero_equals_no_negative(pipe: Pipeline) -> None:
    plain, zero = pipe("a cat", seed=1), pipe("a cat", "blurry", 0, seed=1)
    np.testing.assert_array_equal(plain.images, zero.images)
    assert zero.requests[0].negative_scale == 0.0


@pytest.mark.parametrize("off", [None, "", "  "])
def test_an_empty_negative_is_off(pipe: Pipeline, off: str | None) -> None:
    result = pipe("a cat", off, seed=1)
    assert result.requests[0].negative_prompt is None
    assert result.requests[0].negative_scale is None


def test_the_default_scale_is_the_bundles(pipe: Pipeline) -> None:
    assert pipe("a cat", "blurry", seed=1).requests[0].negative_scale == 0.5


def test_no_seed_draws_one_that_makes_the_image_again(pipe: Pipeline) -> None:
    first = pipe("a cat")
    assert first.seeds != pipe("a cat").seeds
    np.testing.assert_array_equal(pipe("a cat", seed=first.seeds[0]).images, first.images)


def test_a_whole_number_is_a_seed_whatever_its_type(pipe: Pipeline) -> None:
    images = pipe("a cat", seed=7).images
    for seed in (7.0, np.float32(7), np.uint64(7)):
        result = pipe("a cat", seed=seed)
        assert result.metadata(0)["seed"] == "7"
        np.testing.assert_array_equal(result.images, images)


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
    options, go_on, opened = threading.Event(), threading.Event(), []

    def open_engine(graph: str) -> FakeEngine:
        if graph == "text_encoder":
            opened.append(graph)
            options.set()
            assert go_on.wait(30)
        return fakes[graph]

    pipe = Pipeline(original, open_engine, "cpu")
    with ThreadPoolExecutor(3) as threads:
        try:
            new = [threads.submit(pipe, prompt, seed=1) for prompt in ("a red fox", "blurry")]
            assert options.wait(30)
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
    with pytest.raises(BundleError, match="the generator takes 'depth_map', which this snoopi-rt does not provide"):
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
        ({"n": 10**9}, "n must be an integer of at most 10000, got 1000000000"),
        ({"prompt": ["a cat"] * 101, "n": 100}, "10100 images in one call, at most 10000 are drawn"),
        ({"prompt": "a" * 20_000_000}, "prompt has 20000000 characters, at most 32000 are read"),
        ({"negative_prompt": "a" * 32_001}, "negative prompt has 32001 characters, at most 32000 are read"),
        ({"n": 1.0}, "n must be an integer of at least 1, got 1.0"),
        ({"n": True}, "n must be an integer of at least 1, got True"),
        ({"seed": -1}, "seed must be an integer from 0 to 4294967295, got -1"),
        ({"seed": 2**32}, "seed must be an integer from 0 to 4294967295, got 4294967296"),
        ({"seed": 2**32 - 2, "n": 3}, "seed 4294967294 and the 2 after it reach beyond 4294967295, the last seed"),
        ({"prompt": "a\0b"}, "prompt holds the character NUL"),
        ({"negative_prompt": "a\0b"}, "negative prompt holds the character NUL"),
        ({"seed": 1.5}, "seed must be an integer from 0 to 4294967295, got 1.5"),
        ({"seed": float("inf")}, "seed must be an integer from 0 to 4294967295, got inf"),
        ({"seed": False}, "seed must be an integer from 0 to 4294967295, got False"),
        ({"seed": 10**5000}, "seed must be an integer from 0 to 4294967295, got a value of type int"),
        ({"size": (10**5000, 1)}, "size 1xa value of type int is not supported"),
        ({"timeout": 10**400}, "timeout must be a positive number of seconds, at most 1000000000, got 1000"),
        ({"size": (32, 32)}, "size 32x32 is not supported, choose from 16x16, 24x16 (width x height)"),
        ({"size": 16}, "size 16 is not supported, choose from 16x16, 24x16"),
        ({"prompt": ["a cat"] * 2, "seed": [1, 2, 3]}, "lists must have one length, got prompt 2, seed 3"),
    ],
)
def test_what_cannot_be_asked_is_one_clear_line(pipe: Pipeline, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        pipe.generate(**{"prompt": "a cat", **asked})
    assert "\n" not in str(caught.value)


def test_a_bundle_that_changes_while_it_is_opened_is_refused(original: Bundle, fakes: dict[str, FakeEngine], tmp_path: Path) -> None:
    bundle = Bundle.load(shutil.copytree(original.folder, tmp_path / "tiny"))
    opened = []

    def open_engine(graph: str) -> FakeEngine:
        opened.append(graph)
        (bundle.folder / "decoder.onnx").write_bytes(b"another")
        return fakes[graph]

    with pytest.raises(BundleError, match=r"decoder\.onnx is damaged"):
        Pipeline(bundle, open_engine, "cpu").open()
    assert set(opened) == set(GRAPHS)


def test_a_bundle_without_guidance_refuses_a_negative(original: Bundle, fakes: dict[str, FakeEngine]) -> None:
    bundle = replace(original, guidance=replace(original.guidance, kind="none"))
    pipe = Pipeline(bundle, fakes.__getitem__, "cpu")
    assert pipe("a cat", "").requests[0].negative_prompt is None
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


@pytest.mark.parametrize("name", HERE)
def test_auto_runs_the_builds_that_were_measured_here_unless_others_are_asked_for(original: Bundle, name: str) -> None:
    variant = original.variant("generator", name)
    bundle = replace(original, graphs={**original.graphs, "generator": (variant, replace(variant, precision="int8"))})
    with snoopi_rt.load(bundle) as pipe:
        assert pipe.precision == "fp32"
    precision = {"text_encoder": "fp32", "generator": "int8", "decoder": "fp32"}
    remember(bundle, Cache(), {name: Measurement(precision, 0.1)})
    with snoopi_rt.load(bundle) as pipe:
        assert (pipe.engine, pipe.precision) == (name, "text_encoder=fp32,generator=int8,decoder=fp32")
    with snoopi_rt.load(bundle, precision="generator=fp32") as pipe:
        assert (pipe.engine, pipe.precision) == (name, "fp32")
    with snoopi_rt.load(bundle, name) as pipe:
        assert pipe.precision == "fp32"


def test_auto_without_any_engine_says_which_command_installs_one(original: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snoopi_rt.runtime.auto_engine.installed", lambda: ())
    monkeypatch.setattr("snoopi_rt.engines.find_spec", lambda name: None)
    with pytest.raises(EngineMissing, match=re.escape('pip install ".[cpu]"')):
        snoopi_rt.load(original)


def test_load_refuses_threads_below_one_and_unknown_engines(original: Bundle) -> None:
    with pytest.raises(InputError, match="threads must be an integer of at least 1, got 0"):
        snoopi_rt.load(original, threads=0)
    with pytest.raises(InputError, match="threads must be an integer of at most 1024, got 32768"):
        snoopi_rt.load(original, threads=2**15)
    with pytest.raises(InputError, match="unknown engine 'gpu', choose from cpu"):
        snoopi_rt.load(original, "gpu")


def test_an_engine_that_the_bundle_does_not_serve_lists_those_that_it_serves(original: Bundle) -> None:
    for precision in (None, "fp32"):
        with pytest.raises(BundleError, match="bundle 'tiny' has no generator for engine 'cuda', it supports cpu, openvino"):
            snoopi_rt.load(original, "cuda", precision)


@pytest.mark.skipif(len(HERE) < 2, reason="needs both engines")
def test_a_text_encoder_without_a_build_for_the_engine_runs_on_cpu(original: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = replace(original.variant("text_encoder", "cpu"), engines=("cpu",))
    bundle = replace(original, graphs={**original.graphs, "text_encoder": (variant,)})
    opened: dict[str, str] = {}

    def spy(name: str, path: Path, *rest: Any) -> Any:
        opened[path.stem.partition("-")[0]] = name
        return load_engine(name, path, *rest)

    load_engine = pipeline.load_engine
    monkeypatch.setattr(pipeline, "load_engine", spy)
    with snoopi_rt.load(bundle, "openvino") as pipe:
        assert pipe("a cat", "blurry", seed=1).engine == "openvino"
    assert opened == {"text_encoder": "cpu", "generator": "openvino", "decoder": "openvino"}


def test_a_clip_bundle_gets_padded_prompts(original: Bundle, functions: Functions) -> None:
    given: list[list[list[int]]] = []

    def encode(ids: np.ndarray) -> dict[str, np.ndarray]:
        given.append(ids.tolist())
        return functions["text_encoder"](ids)

    variant = original.variant("text_encoder", "cpu")
    fake = FakeEngine(encode, variant.inputs, variant.outputs)
    bundle = replace(original, text=replace(original.text, pad=1))
    others = {graph: FakeEngine(functions[graph], *_specs(original, graph)) for graph in ("generator", "decoder")}
    Pipeline(bundle, {**others, "text_encoder": fake}.__getitem__, "cpu")("a cat", "blurry")
    assert given == [[[0, 3, 7, 1, 1, 1]], [[0, 8, 1, 1, 1, 1]]]


@pytest.mark.parametrize(
    ("generator", "decoder", "drawn", "decoded"),
    [(None, None, [4, 1], [4, 1]), (2, None, [2, 2, 1], [2, 2, 1]), (None, 1, [4, 1], [1] * 5), (64, 3, [4, 1], [3, 1, 1])],
)
def test_the_smallest_batch_of_bundle_and_build_is_obeyed(
    original: Bundle,
    fakes: dict[str, FakeEngine],
    functions: Functions,
    generator: int | None,
    decoder: int | None,
    drawn: list[int],
    decoded: list[int],
) -> None:
    batches: dict[str, list[int]] = {"generator": [], "decoder": []}
    for graph, first in (("generator", "noise"), ("decoder", "latent")):

        def counted(graph: str = graph, first: str = first, **arrays: np.ndarray) -> dict[str, np.ndarray]:
            batches[graph].append(len(arrays[first]))
            return functions[graph](**arrays)

        fakes[graph] = FakeEngine(counted, fakes[graph].inputs, fakes[graph].outputs)
    limits = {"generator": generator, "decoder": decoder}
    graphs = {graph: (replace(variants[0], max_batch=limits.get(graph)),) for graph, variants in original.graphs.items()}
    images = Pipeline(replace(original, graphs=graphs), fakes.__getitem__, "cpu")("a cat", seed=1, n=5).images
    assert batches == {"generator": drawn, "decoder": decoded}
    np.testing.assert_array_equal(images[4], expected(functions, "a cat", None, 0.0, 5))


@pytest.mark.parametrize(("tile", "calls"), [(None, 1), (Tile(12, 2), 1), (Tile(8, 2), 2)])
def test_a_latent_larger_than_a_tile_is_decoded_in_tiles(
    original: Bundle, fakes: dict[str, FakeEngine], functions: Functions, tile: Tile | None, calls: int
) -> None:
    shapes: list[tuple[int, ...]] = []

    def decode(latent: np.ndarray) -> dict[str, np.ndarray]:
        shapes.append(latent.shape[2:])
        return functions["decoder"](latent)

    fakes["decoder"] = FakeEngine(decode, fakes["decoder"].inputs, fakes["decoder"].outputs)
    image = Pipeline(replace(original, tile=tile), fakes.__getitem__, "cpu")("a cat", seed=1, size=(16, 24)).images[0]
    assert len(shapes) == calls
    assert tile is None or max(map(max, shapes)) <= tile.size
    assert np.abs(image.astype(int) - expected(functions, "a cat", None, 0.0, 1, 16, 24)).max() <= 1


class Opened:
    """Opens fake engines and notes which are open at once."""

    def __init__(self, bundle: Bundle, functions: Functions) -> None:
        self.bundle, self.functions = bundle, functions
        self.now: list[str] = []
        self.moments: list[set[str]] = []

    def __call__(self, graph: str) -> FakeEngine:
        opened = self

        class Noted(FakeEngine):
            def close(self) -> None:
                super().close()
                opened.now.remove(graph)

        self.now.append(graph)
        self.moments.append(set(self.now))
        return Noted(self.functions[graph], *_specs(self.bundle, graph))


def _specs(bundle: Bundle, graph: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    variant = bundle.variant(graph, "cpu")
    return variant.inputs, variant.outputs


def test_low_memory_never_has_the_text_encoder_open_beside_the_rest(original: Bundle, functions: Functions) -> None:
    opened = Opened(original, functions)
    with Pipeline(original, opened, "cpu", low_memory=True) as pipe:
        assert opened.moments == []
        image = pipe("a cat", "blurry", seed=1).images[0]
        np.testing.assert_array_equal(image, expected(functions, "a cat", "blurry", 0.5, 1))
        alone = [{"text_encoder"}, {"generator"}, {"generator", "decoder"}]
        assert opened.moments == alone
        pipe("a cat", seed=2)
        assert opened.moments == alone, "a known prompt opens nothing"
        pipe("a red fox", seed=2)
        assert opened.moments == alone * 2
    assert opened.now == []


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_closed_pipeline_opens_nothing_again(original: Bundle, functions: Functions, low_memory: bool) -> None:
    opened = Opened(original, functions)
    with Pipeline(original, opened, "cpu", low_memory=low_memory) as pipe:
        pipe("a cat")
    for prompt in ("a cat", "a red fox"):
        with pytest.raises(EngineError, match="this pipeline is closed"):
            pipe(prompt)
    assert opened.now == []


def test_low_memory_frees_the_text_encoder_when_a_prompt_is_refused(original: Bundle, functions: Functions) -> None:
    opened = Opened(original, functions)
    pipe = Pipeline(original, opened, "cpu", low_memory=True)
    with pytest.raises(InputError, match="the limit is 6"):
        pipe(["a cat", "a a a a a"])
    assert opened.now == []


def test_low_memory_keeps_its_promise_to_many_threads(original: Bundle, pipe: Pipeline, functions: Functions) -> None:
    prompts = ["red", "blue", "fox", "cat", "a fox", "a cat", "a red", "a blue"]
    images = {prompt: pipe(prompt, seed=1).images for prompt in prompts}
    Cache().clear()
    opened = Opened(original, functions)

    def open_slowly(graph: str) -> FakeEngine:
        time.sleep(0.002)
        return opened(graph)

    with Pipeline(original, open_slowly, "cpu", low_memory=True) as low, ThreadPoolExecutor(8) as threads:
        for prompt, result in zip(prompts, threads.map(lambda prompt: low(prompt, seed=1), prompts), strict=True):
            np.testing.assert_array_equal(result.images, images[prompt])
    assert opened.moments.count({"text_encoder"}) == len(prompts)
    assert all(moment == {"text_encoder"} or "text_encoder" not in moment for moment in opened.moments)


@pytest.mark.parametrize("name", HERE)
def test_low_memory_gives_the_same_image(original: Bundle, name: str) -> None:
    with snoopi_rt.load(original, name) as usual, snoopi_rt.load(original, name, low_memory=True) as low:
        images = usual("a cat", "blurry", seed=1).images
        Cache().clear()
        np.testing.assert_array_equal(low("a cat", "blurry", seed=1).images, images)
        assert low.provider == usual.provider


def test_warmup_of_a_bundle_with_prompts_only_takes_one_of_them(prompts_only: Bundle, fakes: dict[str, FakeEngine]) -> None:
    Pipeline(prompts_only, fakes.__getitem__, "cpu").warmup()
    assert [fakes[graph].calls for graph in ("text_encoder", "generator", "decoder")] == [0, 1, 1]


def test_a_result_says_the_precision_of_every_graph_so_that_it_can_be_asked_for_again(
    original: Bundle, fakes: dict[str, FakeEngine]
) -> None:
    assert Pipeline(original, fakes.__getitem__, "cpu")("a cat").precision == "fp32"
    variant = original.variant("generator", "cpu")
    bundle = replace(original, graphs={**original.graphs, "generator": (variant, replace(variant, precision="int8"))})
    said = Pipeline(bundle, fakes.__getitem__, "cpu", "int8")("a cat").metadata(0)["precision"]
    assert said == "text_encoder=fp32,generator=int8,decoder=fp32"
    assert Pipeline(bundle, fakes.__getitem__, "cpu", said).precision == said
