"""What cannot be drawn is one clear line, and never a picture."""

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snoopi_rt.bundle.bundle import GRAPHS, Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.cli.compare import compare
from snoopi_rt.engines import ENGINES
from snoopi_rt.engines.base import TensorSpec
from snoopi_rt.engines.fake import FakeEngine
from snoopi_rt.errors import BundleError, EngineError, InputError, OutputError, how_to_find_node
from snoopi_rt.pipeline import Pipeline


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
    with pytest.raises(
        OutputError, match=r"generator gave NaN or infinity on engine 'cpu' for seed 8: .*; snoopi-rt compare .*--graph generator"
    ):
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
    with pytest.raises(
        OutputError, match=r"decoder gave one value for all pixels on engine 'cpu' for seed 8: .*; snoopi-rt compare .*--graph decoder"
    ):
        Pipeline(original, fakes.__getitem__, "cpu")("a cat", seed=7, n=3)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_command_that_such_an_error_names_is_one_that_compare_takes(engine: str) -> None:
    words = how_to_find_node("generator", engine).removesuffix(" names the node").split()
    asked = compare.make_context("compare", words[2:]).params
    assert words[:2] == ["snoopi-rt", "compare"] and asked["graphs"] == ("generator",) and asked["layers"]
    assert asked["names"][1] == engine != asked["names"][0]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt": ""}, "prompt is empty: say what to draw"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": None}, "prompt must be text, got None"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": ["a cat", ""]}, "prompt is empty: say what to draw (prompt 2 of 2)"),
        ({"prompt": "a a a a a"}, "prompt has 7 tokens, the limit is 6"),
        ({"negative_prompt": "a a a a a"}, "negative prompt has 7 tokens, the limit is 6"),
        ({"prompt": ["a fox", "a a a a a"]}, "prompt 'a a a a a' has 7 tokens, the limit is 6"),
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
        ({"prompt": "a\0b"}, "prompt contains a NUL character"),
        ({"negative_prompt": "a\0b"}, "negative prompt contains a NUL character"),
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


def test_a_closed_pipeline_says_so(pipe: Pipeline) -> None:
    with pipe:
        pipe("a cat")
    with pytest.raises(EngineError, match="closed"):
        pipe("a cat")
