"""`snoopi-rt bench` and `build`: engines measured and compiled ahead."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import needs_engine, run
from tiny_bundle import HERE

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.diagnostics.bench import cold_start
from snoopi_rt.runtime.auto_engine import EngineTiming, measurements


@pytest.mark.parametrize(("name", "code"), [("gpu", 2), ("tensorrt", 1)])
def test_bench_knows_before_it_measures_that_an_engine_cannot_be_measured(
    original: Bundle, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    monkeypatch.setattr("snoopi_rt.diagnostics.bench.measure_engine", lambda *_: pytest.fail("measured"))
    assert len(run("bench", "--bundle", original.folder, "--engine", HERE[0], "--engine", name, code=code).stderr.splitlines()) == 1


@needs_engine
def test_bench_ends_with_one_json_document_and_remembers(original: Bundle, here: Path) -> None:
    result = run("bench", "--bundle", original.folder, "--engine", HERE[0], "--runs", 3)
    document = json.loads(result.stdout.splitlines()[-1])
    measured = document["engines"][HERE[0]]
    for way in ("plain", "negative"):
        assert 0 < measured[way]["total"]["p50"] <= measured[way]["total"]["p95"]
    assert measured["cold_start"]["first"] > 0
    assert measured["cold_start"]["peak_memory"] is None or measured["cold_start"]["peak_memory"] > 2**20
    assert measured["provider"]
    best = EngineTiming(dict.fromkeys(original.graphs, "fp32"), measured["plain"]["total"]["p50"])
    assert measurements(original, Cache()) == {HERE[0]: best}
    assert result.stdout.splitlines()[-2] == f"from now on --engine auto uses {HERE[0]} in fp32"
    assert Cache().sizes()["states"] == 0, "its random prompts are nobody's"


@needs_engine
@pytest.mark.parametrize("words", [("--threads", 1), ("--precision", "fp32")])
def test_bench_remembers_only_what_load_does_by_itself(
    original: Bundle, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...]
) -> None:
    monkeypatch.setattr(
        "snoopi_rt.diagnostics.bench.cold_start",
        lambda *given: dict.fromkeys(("first", "again", "peak_memory", "peak_again")) | {"first": 1.0, "again": 1.0},
    )
    said = run("bench", "--bundle", original.folder, "--engine", HERE[0], "--runs", 1, *words).stdout.splitlines()[-2]
    assert said.startswith("--engine auto uses cpu in fp32, as before: measurements with --precision or --threads")
    assert measurements(original, Cache()) == {}


@needs_engine
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak")
def test_the_memory_of_a_cold_start_is_its_own_and_not_that_of_the_process_that_measures(original: Bundle) -> None:
    size = 2**29
    assert np.ones(size, np.uint8).all()
    peak = cold_start(original.folder, HERE[0], None, 1)["peak_memory"]
    assert peak is None or 2**24 < peak < size


@needs_engine
@pytest.mark.parametrize("name", HERE)
def test_build_compiles_ahead_and_says_what_it_runs_on(original: Bundle, name: str, here: Path) -> None:
    said = run("build", "--bundle", original.folder, "--engine", name).stdout
    assert said.startswith("ready on CPU") and str(Cache().path) in said
    assert (Cache().sizes()["engines"] > 0) == (name == "openvino")  # ONNX Runtime keeps nothing so small
    assert "has no generator for engine 'tensorrt'" in run("build", "--bundle", original.folder, "--engine", "tensorrt", code=1).output
