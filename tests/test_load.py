"""What is opened when, and on which engine with which variants."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import HERE

import snoopi_rt
from snoopi_rt import loading
from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.engines.fake import FakeEngine
from snoopi_rt.errors import BundleError, EngineMissing, InputError
from snoopi_rt.pipeline import Pipeline
from snoopi_rt.runtime.auto_engine import EngineTiming, remember


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


def test_warmup_opens_every_stage(pipe: Pipeline, fakes: dict[str, FakeEngine]) -> None:
    assert pipe.warmup() is pipe
    assert [fake.calls for fake in fakes.values()] == [1, 1, 1]


@pytest.mark.parametrize("name", HERE)
def test_auto_runs_the_variants_that_were_measured_here_unless_others_are_asked_for(original: Bundle, name: str) -> None:
    variant = original.variant("generator", name)
    bundle = replace(original, graphs={**original.graphs, "generator": (variant, replace(variant, precision="int8"))})
    with snoopi_rt.load(bundle) as pipe:
        assert pipe.precision == "fp32"
    precision = {"text_encoder": "fp32", "generator": "int8", "decoder": "fp32"}
    remember(bundle, Cache(), {name: EngineTiming(precision, 0.1)})
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
def test_a_text_encoder_without_a_variant_for_the_engine_runs_on_cpu(original: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = replace(original.variant("text_encoder", "cpu"), engines=("cpu",))
    bundle = replace(original, graphs={**original.graphs, "text_encoder": (variant,)})
    opened: dict[str, str] = {}

    def spy(name: str, path: Path, *rest: Any) -> Any:
        opened[path.stem.partition("-")[0]] = name
        return load_engine(name, path, *rest)

    load_engine = loading.load_engine
    monkeypatch.setattr(loading, "load_engine", spy)
    with snoopi_rt.load(bundle, "openvino") as pipe:
        assert pipe("a cat", "blurry", seed=1).engine == "openvino"
    assert opened == {"text_encoder": "cpu", "generator": "openvino", "decoder": "openvino"}


def test_warmup_of_a_bundle_with_prompts_only_takes_one_of_them(prompts_only: Bundle, fakes: dict[str, FakeEngine]) -> None:
    Pipeline(prompts_only, fakes.__getitem__, "cpu").warmup()
    assert [fakes[graph].calls for graph in ("text_encoder", "generator", "decoder")] == [0, 1, 1]
