"""With low_memory the text encoder and the rest are never open at once."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tiny_bundle import HERE, SPECS
from tiny_images import Functions, expected

import snoopi_rt
from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.engines.fake import FakeEngine
from snoopi_rt.errors import EngineError, InputError
from snoopi_rt.pipeline import Pipeline


class Opened:
    """Opens fake engines and notes which are open at once."""

    def __init__(self, functions: Functions) -> None:
        self.functions = functions
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
        return Noted(self.functions[graph], *SPECS[graph])


def test_low_memory_never_has_the_text_encoder_open_beside_the_rest(original: Bundle, functions: Functions) -> None:
    opened = Opened(functions)
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


def test_low_memory_keeps_its_promise_when_all_is_opened_and_when_it_says_what_it_runs_on(original: Bundle, functions: Functions) -> None:
    opened = Opened(functions)
    with Pipeline(original, opened, "cpu", low_memory=True) as pipe:
        pipe.open()
        pipe.prepare("a cat")
        assert pipe.provider
    assert opened.moments == [{"text_encoder"}, {"generator"}, {"generator", "decoder"}] * 2


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_closed_pipeline_opens_nothing_again(original: Bundle, functions: Functions, low_memory: bool) -> None:
    opened = Opened(functions)
    with Pipeline(original, opened, "cpu", low_memory=low_memory) as pipe:
        pipe("a cat")
    for prompt in ("a cat", "a red fox"):
        with pytest.raises(EngineError, match="this pipeline is closed"):
            pipe(prompt)
    assert opened.now == []


def test_low_memory_frees_the_text_encoder_when_a_prompt_is_refused(original: Bundle, functions: Functions) -> None:
    opened = Opened(functions)
    pipe = Pipeline(original, opened, "cpu", low_memory=True)
    with pytest.raises(InputError, match="the limit is 6"):
        pipe(["a cat", "a a a a a"])
    assert opened.now == []


def test_low_memory_keeps_its_promise_to_many_threads(original: Bundle, pipe: Pipeline, functions: Functions) -> None:
    prompts = ["red", "blue", "fox", "cat", "a fox", "a cat", "a red", "a blue"]
    images = {prompt: pipe(prompt, seed=1).images for prompt in prompts}
    Cache().clear()
    opened = Opened(functions)

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
