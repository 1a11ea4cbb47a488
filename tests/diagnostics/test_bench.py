"""`bench` measures every variant of every graph and leaves behind what engine "auto" takes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import HERE

from snoopi_rt.bundle.bundle import GRAPHS, Bundle
from snoopi_rt.bundle.variant import meaning
from snoopi_rt.cache import Cache
from snoopi_rt.diagnostics import bench as module
from snoopi_rt.diagnostics.bench import bench, cold_start, measure, table, verdict
from snoopi_rt.engines.fake import FakeEngine
from snoopi_rt.errors import InputError
from snoopi_rt.pipeline import Pipeline
from snoopi_rt.prompt_encoder import write_prompts
from snoopi_rt.runtime.auto_engine import Choice, EngineTiming, choose_engine, measurements

ENGINE = HERE[0]
START = {"first": 1.0, "again": 0.5, "peak_memory": 2**27, "peak_again": None}
pytestmark = pytest.mark.skipif(not HERE, reason="needs an engine")


@pytest.fixture
def no_cold_start(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What cold starts were asked for; they take seconds and have a test of their own."""
    asked: list[tuple[Any, ...]] = []

    def start(*given: Any) -> dict[str, Any]:
        asked.append(given)
        return START

    monkeypatch.setattr(module, "cold_start", start)
    return asked


@pytest.fixture
def bundle(original: Bundle, folder: Path) -> Bundle:
    """A bundle with three variants of the generator and two of the decoder; the last of each is for an engine that is not here."""

    def more(graph: str, *precisions: str) -> tuple[Any, ...]:
        (variant,) = original.graphs[graph]
        others = [replace(variant, precision=precision) for precision in precisions]
        return variant, *others, replace(variant, precision="tf32", engines=("cuda",))

    graphs = {**original.graphs, "generator": more("generator", "fp16", "bf16"), "decoder": more("decoder", "fp16")}
    return replace(original, graphs=graphs).save(folder)


def test_every_build_of_the_engine_is_measured_and_the_fastest_of_each_graph_is_remembered(
    bundle: Bundle, no_cold_start: list[tuple[Any, ...]]
) -> None:
    said: list[str] = []
    document = bench(bundle, [ENGINE], None, None, 3, said.append)
    found = document["engines"][ENGINE]
    assert {graph: list(variants) for graph, variants in found["variants"].items()} == {
        "text_encoder": ["fp32"],
        "generator": ["fp32", "fp16", "bf16"],
        "decoder": ["fp32", "fp16"],
    }
    for graph, variants in found["variants"].items():
        assert all(0 < taken["p50"] <= taken["p95"] for taken in variants.values())
        assert found["precision"][graph] == min(variants, key=lambda name: variants[name]["p50"])
    assert found["runs"] == 3
    for way in ("plain", "negative"):
        assert sum(found[way][graph]["p50"] for graph in GRAPHS) < 2 * found[way]["total"]["p50"]
    assert measurements(bundle, Cache()) == {ENGINE: EngineTiming(found["precision"], found["plain"]["total"]["p50"])}
    assert choose_engine(bundle, Cache()) == Choice(ENGINE, found["precision"])
    assert document["auto"] == {"engine": ENGINE, "precision": found["precision"], "remembered": True}
    assert no_cold_start[0][2] == ",".join(f"{graph}={name}" for graph, name in found["precision"].items())
    assert len([line for line in said if "images with" in line]) == 4
    assert Cache().sizes()["states"] == Cache().sizes()["engines"] == 0, "its prompts and its losers are nobody's"


def test_the_table_has_a_line_for_every_build_and_every_figure_of_an_engine(bundle: Bundle, no_cold_start: list[tuple[Any, ...]]) -> None:
    document = bench(bundle, HERE, None, None, 1, lambda line: None)
    lines = table(document).splitlines()
    for engine in HERE:
        for words in (
            "text_encoder fp32",
            "generator fp16",
            "generator bf16",
            "decoder fp32",
            "image",
            "image with a negative prompt",
        ):
            assert [line for line in lines if line.startswith(f"{engine} {words} ")], words
        assert f"{engine} cold start 1.00 s, again 0.50 s, peak memory 128 MiB, again unknown" in lines
        marked = {tuple(line.split()[1:3]) for line in lines if line.startswith(engine) and line.endswith("fastest")}
        precision = document["engines"][engine]["precision"]
        assert marked == {(graph, precision[graph]) for graph in ("generator", "decoder")}
    assert json.loads(json.dumps(document)) == document
    # The words for a precision are those of `info` and of the table in docs/benchmarks.md.
    assert f"fp16 on {', '.join(HERE)}: fp16 weights, fp32 arithmetic" in lines
    assert "fp16 on cpu, openvino: fp16 weights, fp32 arithmetic" in bundle.described().splitlines()
    assert "bf16 on cpu, openvino: fp16 weights, bf16 arithmetic" in bundle.described().splitlines()
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    assert all(f"| {engine} ({meaning('fp16', engine)}) |" in page for engine in HERE)


def test_what_is_not_remembered_is_said_with_its_reason(
    bundle: Bundle, no_cold_start: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("SNOOPI_RT_CACHE", str(tmp_path / "file"))
    document = bench(bundle, [ENGINE], None, None, 1, lambda line: None)
    assert not document["auto"]["remembered"]
    assert verdict(document).startswith("--engine auto uses cpu in fp32, as before: nothing is cached in ")


@pytest.mark.parametrize(("precision", "threads"), [("fp16", None), (None, 1), ("generator=bf16", None)])
def test_what_load_does_not_do_by_itself_is_measured_but_not_remembered(
    bundle: Bundle, no_cold_start: list[tuple[Any, ...]], precision: str | None, threads: int | None
) -> None:
    found = bench(bundle, [ENGINE], precision, threads, 1, lambda line: None)["engines"][ENGINE]
    if precision is not None:
        assert list(found["variants"]["generator"]) == [precision.rpartition("=")[2]]
        assert all(len(variants) == 1 for variants in found["variants"].values())
    assert measurements(bundle, Cache()) == {}


def test_a_bundle_without_text_encoder_is_measured_with_the_prompts_that_it_knows(
    bundle: Bundle, no_cold_start: list[tuple[Any, ...]]
) -> None:
    states = {text: {"states": np.ones((1, tokens, 4), np.float32)} for tokens, text in enumerate(("a cat", "a red fox"), 2)}
    graphs = {graph: variants for graph, variants in bundle.graphs.items() if graph != "text_encoder"}
    text = replace(bundle.text, tokenizer=None)
    bundle = replace(bundle, graphs=graphs, text=text, prompts=write_prompts(bundle.folder, states)).save(bundle.folder)
    found = bench(bundle, [ENGINE], None, None, 2, lambda line: None)["engines"][ENGINE]
    assert set(found["variants"]) == {"generator", "decoder"}
    assert found["negative"]["total"]["p50"] > 0
    assert no_cold_start[0][-1] in states
    assert choose_engine(bundle, Cache()).precision == found["precision"]


def test_a_bundle_without_guidance_is_measured_without_a_negative(bundle: Bundle, no_cold_start: list[tuple[Any, ...]]) -> None:
    bundle = replace(bundle, guidance=replace(bundle.guidance, kind="none")).save(bundle.folder)
    document = bench(bundle, [ENGINE], "fp32", None, 1, lambda line: None)
    assert "negative" not in document["engines"][ENGINE]
    assert "negative" not in table(document)


def test_slow_bundles_are_measured_with_fewer_images_unless_a_number_is_given(
    pipe: Pipeline, fakes: dict[str, FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(measure(pipe, None)["plain"]["total"]) == module.RUNS
    monkeypatch.setattr(module, "MAX_SECONDS", 0.0)
    assert len(measure(pipe, None, 1)["negative"]["total"]) == module.MIN_RUNS
    assert len(measure(pipe, 5, 2)["plain"]["total"]) == 5


def test_every_image_of_a_series_has_a_prompt_of_its_own(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    generate = pipe.generate

    def record(*given: Any, **named: Any) -> Any:
        asked.append(given)
        return generate(*given, **named)

    monkeypatch.setattr(pipe, "generate", record)
    for series in (0, 1):
        measure(pipe, 4, series)
    warm = {asked[index][0] for index in (0, 1, 10, 11)}
    prompts = [given[0] for index, given in enumerate(asked) if index not in (0, 1, 10, 11)]
    assert len(set(prompts)) == len(prompts) == 16
    assert not warm & set(prompts)
    assert len({len(prompt) for prompt in prompts}) == 1
    assert [given[1] for given in asked[2:6]] == [None, "blurry", None, "blurry"]


def test_runs_below_one_are_refused(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="runs must be an integer of at least 1, got 0"):
        bench(bundle, [ENGINE], None, None, 0, lambda line: None)


def test_a_cold_start_is_measured_twice_with_its_own_memory_and_leaves_nothing(bundle: Bundle) -> None:
    size = 2**28
    assert np.ones(size, np.uint8).all()
    Cache().write("states", "a", b"")
    start = cold_start(bundle.folder, ENGINE, "generator=fp16,decoder=fp32", 1, "a cat")
    assert start["first"] > 0
    assert start["again"] > 0
    for peak in (start["peak_memory"], start["peak_again"]):
        assert peak is None or 2**24 < peak < size, "that of the process that measures does not count"
    assert {path.name for path in Cache().path.iterdir()} == {"hashes", "scratch", "states"}
    assert not list((Cache().path / "scratch").iterdir())
