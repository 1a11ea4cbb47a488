"""A prompt becomes the images that numpy says, on every engine."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from tiny_bundle import HERE, SPECS
from tiny_images import Functions, expected

import snoopi_rt
from snoopi_rt.bundle.bundle import Bundle, Tile
from snoopi_rt.engines.base import TensorSpec
from snoopi_rt.engines.fake import FakeEngine
from snoopi_rt.pipeline import Pipeline
from snoopi_rt.runtime.inputs import draw_noise


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


@pytest.mark.parametrize("name", HERE)
def test_many_threads_may_call_one_pipeline(original: Bundle, functions: Functions, name: str) -> None:
    jobs = [(prompt, seed) for seed, prompt in enumerate(itertools.islice(itertools.cycle(["a red fox", "a cat", "blurry"]), 24))]
    with snoopi_rt.load(original, name, threads=1) as pipe, ThreadPoolExecutor(8) as threads:
        alone = [pipe(prompt, "blurry", seed=seed).images for prompt, seed in jobs]
        together = list(threads.map(lambda job: pipe(job[0], "blurry", seed=job[1]), jobs))
        np.testing.assert_array_equal(np.concatenate([result.images for result in together]), np.concatenate(alone))
        for (prompt, seed), result in zip(jobs, together, strict=True):
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


def test_an_over_long_prompt_can_be_truncated(pipe: Pipeline) -> None:
    np.testing.assert_array_equal(pipe("a a a a a", seed=1, truncate=True).images, pipe("a a a a", seed=1).images)


def test_timings_tell_the_stages_and_the_total(pipe: Pipeline) -> None:
    timings = pipe("a cat").timings
    assert list(timings) == ["text_encoder", "generator", "decoder", "total"]
    assert 0 < sum(list(timings.values())[:3]) <= timings["total"]


def test_pillow_images_have_the_same_pixels(pipe: Pipeline) -> None:
    result = pipe("a cat", n=2)
    assert [np.asarray(image).tolist() for image in result.pil()] == result.images.tolist()


def test_a_clip_bundle_gets_padded_prompts(original: Bundle, functions: Functions) -> None:
    given: list[list[list[int]]] = []

    def encode(ids: np.ndarray) -> dict[str, np.ndarray]:
        given.append(ids.tolist())
        return functions["text_encoder"](ids)

    variant = original.variant("text_encoder", "cpu")
    fake = FakeEngine(encode, variant.inputs, variant.outputs)
    bundle = replace(original, text=replace(original.text, pad=1))
    others = {graph: FakeEngine(functions[graph], *SPECS[graph]) for graph in ("generator", "decoder")}
    Pipeline(bundle, {**others, "text_encoder": fake}.__getitem__, "cpu")("a cat", "blurry")
    assert given == [[[0, 3, 7, 1, 1, 1]], [[0, 8, 1, 1, 1, 1]]]


@pytest.mark.parametrize(
    ("generator", "decoder", "drawn", "decoded"),
    [(None, None, [4, 1], [4, 1]), (2, None, [2, 2, 1], [2, 2, 1]), (None, 1, [4, 1], [1] * 5), (64, 3, [4, 1], [3, 1, 1])],
)
def test_the_smallest_batch_of_bundle_and_variant_is_obeyed(
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


def test_a_result_says_the_precision_of_every_graph_so_that_it_can_be_asked_for_again(
    original: Bundle, fakes: dict[str, FakeEngine]
) -> None:
    assert Pipeline(original, fakes.__getitem__, "cpu")("a cat").precision == "fp32"
    variant = original.variant("generator", "cpu")
    bundle = replace(original, graphs={**original.graphs, "generator": (variant, replace(variant, precision="int8"))})
    said = Pipeline(bundle, fakes.__getitem__, "cpu", "int8")("a cat").metadata(0)["precision"]
    assert said == "text_encoder=fp32,generator=int8,decoder=fp32"
    assert Pipeline(bundle, fakes.__getitem__, "cpu", said).precision == said
