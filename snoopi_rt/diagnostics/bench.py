"""How fast a bundle is on this machine: latency per stage of every engine and variant, cold start and peak memory."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from snoopi_rt.bundle.bundle import GRAPHS, Bundle, Variant
from snoopi_rt.bundle.variant import legend
from snoopi_rt.cache import Cache
from snoopi_rt.engines import check_engine
from snoopi_rt.errors import BundleError, EngineError, EngineMissing
from snoopi_rt.loading import open_pipeline
from snoopi_rt.pipeline import Pipeline
from snoopi_rt.request import integer
from snoopi_rt.runtime.auto_engine import EngineTiming, choose_engine, measurements, remember
from snoopi_rt.runtime.precision import format_names, format_precision, select_variants
from snoopi_rt.shell import join

PROMPT, NEGATIVE = "a red apple on a blue background", "blurry"
RUNS, MAX_SECONDS, MIN_RUNS = 20, 30.0, 3
"""By default RUNS images per measurement, or as many as fit into MAX_SECONDS, but at least MIN_RUNS."""
COLD_START = """
from snoopi_rt.cli.main import main
try:
    main(prog_name="snoopi-rt")
finally:
    try:
        print(open("/proc/self/status").read())
    except OSError:
        pass
"""
"""The command line as a program that prints its own peak memory: on Linux, that of `wait4` includes the parent's."""


Variants = dict[str, Variant]
Timings = dict[str, dict[str, list[float]]]
"""Seconds by kind of image ("plain", "negative"), then by stage or "total"."""


def bench(
    bundle: Bundle, engines: list[str], precision: str | None, threads: int | None, runs: int | None, report: Callable[[str], None]
) -> dict[str, Any]:
    """The measurements as a JSON document, see `measure_engine` and `cold_start`.

    Without a precision every variant is measured; the fastest of each graph, and the time per image with them, are stored for engine
    "auto". "auto": the engine that "auto" uses from now on, and its precisions; "remembered": whether these measurements decide that.
    `report` is called with a line before each step. Raises what `load` and `Pipeline.generate` raise.
    """
    if runs is not None:
        integer("runs", runs, 1)
    for engine in engines:
        check_engine(engine)
    # Checked before the first is measured, which takes a while.
    selected = {engine: select_variants(bundle, engine, precision) for engine in engines}
    results: dict[str, dict[str, Any]] = {}
    for engine, fixed in selected.items():
        variants = {graph: [fixed[graph]] if precision else list(bundle.variants(graph, engine)) for graph in fixed}
        result = measure_engine(bundle, engine, variants, threads, runs, report)
        report(f"{engine}: two cold starts")
        chosen = ",".join(f"{graph}={name}" for graph, name in result["precision"].items())
        results[engine] = {**result, "cold_start": cold_start(bundle.folder, engine, chosen, threads, _prompt(bundle, 0))}
    cache, measured = Cache(), {}
    if precision is None and threads is None:
        measured = {engine: EngineTiming(result["precision"], result["plain"]["total"]["p50"]) for engine, result in results.items()}
        remember(bundle, cache, measured)
    remembered = bool(measured) and measurements(bundle, cache).items() >= measured.items()
    return {
        "bundle": bundle.name,
        "hash": bundle.hash,
        "precision": precision,
        "threads": threads,
        "runs": runs,
        "engines": results,
        "auto": {**_auto(bundle, cache), "remembered": remembered},
    }


def _auto(bundle: Bundle, cache: Cache) -> dict[str, Any]:
    try:
        return asdict(choose_engine(bundle, cache))
    except (BundleError, EngineMissing):  # none of the measured engines is ever chosen by auto
        return {"engine": None, "precision": {}}


def measure_engine(
    bundle: Bundle, engine: str, variants: dict[str, list[Variant]], threads: int | None, runs: int | None, report: Callable[[str], None]
) -> dict[str, Any]:
    """The time of each variant, the fastest of each graph, and the time per image with those, plain and with a negative prompt.

    "variants": p50 and p95 in seconds by graph and precision; "precision": the fastest by graph; "plain" and "negative": p50 and p95 by
    stage and in "total"; "provider"; "runs": the number of images of each kind.
    """
    rounds = max(map(len, variants.values()))
    latencies: dict[str, dict[str, dict[str, float]]] = {graph: {} for graph in variants}
    with Cache().scratch() as scratch:
        # Too small for a large compiled model: nobody needs those of variants that lose.
        cache = Cache(scratch, limit=2**28)

        def measure_variants(chosen: Variants, series: int) -> tuple[Timings, str]:
            report(f"{engine}: images with {format_precision(chosen)}")
            narrowed = replace(bundle, graphs={graph: (variant,) for graph, variant in chosen.items()})
            with open_pipeline(narrowed, engine, None, threads, cache) as pipe:
                return measure(pipe, runs, series), pipe.provider

        for round in range(rounds):
            places = {graph: min(round, len(variants[graph]) - 1) for graph in variants}
            chosen = {graph: variants[graph][place] for graph, place in places.items()}
            # The same prompts while the text encoder is the same: cached ones need not be encoded again.
            timings, provider = measure_variants(chosen, places.get("text_encoder", 0))
            for graph, variant in chosen.items():
                latencies[graph].setdefault(variant.precision, _percentiles(timings["plain"][graph]))
        best = {graph: min(variants[graph], key=lambda variant: latencies[graph][variant.precision]["p50"]) for graph in variants}
        if rounds > 1:
            timings, provider = measure_variants(best, rounds)
    ways = {way: {stage: _percentiles(seconds) for stage, seconds in stages.items()} for way, stages in timings.items()}
    precision = {graph: variant.precision for graph, variant in best.items()}
    return {"provider": provider, "variants": latencies, "precision": precision, **ways, "runs": len(timings["plain"]["total"])}


def bench_prompts(bundle: Bundle) -> tuple[str, str | None]:
    """A prompt and a negative prompt that the bundle can draw; None if it supports no negative prompts."""
    prompt, negative = (PROMPT, NEGATIVE) if "text_encoder" in bundle.graphs else (_prompt(bundle, 0), _prompt(bundle, -1))
    return prompt, None if bundle.guidance.kind == "none" else negative


def measure(pipe: Pipeline, runs: int | None, series: int = 0) -> Timings:
    """The seconds of each run by stage, "plain" and with a "negative" prompt, alternating so that both meet the same conditions.

    Every prompt of a series is new, so the text encoder runs for every image; the negative prompt is encoded once, beforehand.
    """
    bundle, first = pipe.bundle, 10_000 * series
    negatives: dict[str, str | None] = {"plain": None}
    if bundle.guidance.kind != "none":
        negatives["negative"] = NEGATIVE if "text_encoder" in bundle.graphs else _prompt(bundle, first)
    for negative in negatives.values():
        pipe.generate(_prompt(bundle, first), negative, seed=0, truncate=True)
    timings: Timings = {way: {stage: [] for stage in (*GRAPHS, "total")} for way in negatives}
    start = time.perf_counter()
    for run in range(RUNS if runs is None else runs):
        if runs is None and run >= MIN_RUNS and time.perf_counter() - start > MAX_SECONDS * len(negatives):
            break
        for place, (way, negative) in enumerate(negatives.items(), 1):
            prompt = _prompt(bundle, first + len(negatives) * run + place)
            for stage, seconds in pipe.generate(prompt, negative, seed=run, truncate=True).timings.items():
                timings[way][stage].append(seconds)
    return timings


def cold_start(folder: Path, engine: str, precision: str | None, threads: int | None, prompt: str = PROMPT) -> dict[str, float | None]:
    """The seconds from process start to written PNG with an empty cache ("first") and with the one it filled ("again").

    Also the peak memory of both in bytes ("peak_memory", "peak_again"), None if the system does not report it.
    """
    words = ["generate", prompt, "--bundle", str(folder), "--engine", engine, "--force", "--truncate"]
    words += [] if precision is None else ["--precision", precision]
    words += [] if threads is None else ["--threads", str(threads)]
    with Cache().scratch() as scratch:
        words += ["--output", str(scratch / "image.png")]
        environment = {**os.environ, "SNOOPI_RT_CACHE": str(scratch / "cache")}
        first, peak = _run(words, environment)
        again, peak_again = _run(words, environment)
    return {"first": first, "again": again, "peak_memory": peak, "peak_again": peak_again}


def table(document: dict[str, Any]) -> str:
    """The document as a table for people."""
    lines = [f"{'milliseconds':46}{'p50':>10}{'p95':>10}"]
    for engine, result in document["engines"].items():
        for graph, variants in result["variants"].items():
            for precision, latency in variants.items():
                fastest = "  fastest" if len(variants) > 1 and result["precision"][graph] == precision else ""
                lines.append(_line(f"{engine} {graph} {precision}", latency) + fastest)
        for way, words in ("plain", "image"), ("negative", "image with a negative prompt"):
            if way in result:
                lines.append(_line(f"{engine} {words}", result[way]["total"]))
    for engine, result in document["engines"].items():
        start = result["cold_start"]
        lines.append(
            f"{engine} cold start {start['first']:.2f} s, again {start['again']:.2f} s, "
            f"peak memory {_mebibytes(start['peak_memory'])}, again {_mebibytes(start['peak_again'])}"
        )
    names = [
        (name, engine) for engine, result in document["engines"].items() for variants in result["variants"].values() for name in variants
    ]
    return "\n".join([*lines, *legend(names)])


def verdict(document: dict[str, Any]) -> str:
    """Which engine `auto` uses from now on, and if nothing was remembered why not."""
    auto = document["auto"]
    uses = "uses none" if auto["engine"] is None else f"uses {auto['engine']} in {format_names(auto['precision'])}"
    if auto["remembered"]:
        return f"from now on --engine auto {uses}"
    problem = Cache().problem()
    why = f"nothing is cached in {Cache().path}: {problem}" if problem else "measurements with --precision or --threads are not remembered"
    return f"--engine auto {uses}, as before: {why}"


def _line(label: str, latency: dict[str, float]) -> str:
    return f"{label:46}{1000 * latency['p50']:10.1f}{1000 * latency['p95']:10.1f}"


def _mebibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:.0f} MiB"


def _prompt(bundle: Bundle, number: int) -> str:
    """A different prompt for each number, all of equal length; one that is stored in the bundle if it has no text encoder."""
    if bundle.prompts is None or "text_encoder" in bundle.graphs:
        return f"{100_000 + number} {PROMPT}"
    return bundle.prompts.texts[number % len(bundle.prompts.texts)]


def _percentiles(seconds: list[float]) -> dict[str, float]:
    return {"p50": float(np.percentile(seconds, 50)), "p95": float(np.percentile(seconds, 95))}


def _run(words: list[str], environment: dict[str, str]) -> tuple[float, int | None]:
    """The wall-clock seconds of `snoopi-rt WORDS`, and the peak memory in bytes that it printed, None if it printed none."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-P", "-c", COLD_START, *words], env=environment, stdout=subprocess.PIPE, encoding="utf-8", check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise EngineError(f"the cold start exited with code {done.returncode}: {join(['snoopi-rt', *words])}")
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", done.stdout, re.MULTILINE)
    return seconds, None if peak is None else int(peak[1]) * 1024
