"""How fast a bundle is on this machine: every engine and every variant of each graph by stage, cold start and peak memory."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from snoopi_rt.bundle.bundle import Bundle, Variant
from snoopi_rt.bundle.manifest import legend
from snoopi_rt.cache import Cache
from snoopi_rt.engines import check_engine
from snoopi_rt.errors import BundleError, EngineError, EngineMissing
from snoopi_rt.pipeline import STAGES, Pipeline, open_pipeline
from snoopi_rt.request import integer
from snoopi_rt.runtime.auto_engine import Measured, choose, measurements, remember
from snoopi_rt.runtime.precision import format_names, format_precision, select_variants
from snoopi_rt.shell import join

PROMPT, NEGATIVE = "a red apple on a blue background", "blurry"
RUNS, SECONDS, LEAST = 20, 30.0, 3
"""Where no number of images is given: RUNS for a figure, or as many as fit into SECONDS, but LEAST."""
COLD = """
from snoopi_rt.cli.main import main
try:
    main(prog_name="snoopi-rt")
finally:
    try:
        print(open("/proc/self/status").read())
    except OSError:
        pass
"""
"""The command line as a program that tells its peak memory itself: on Linux, what `wait4` tells begins with the parent's."""


Variants = dict[str, Variant]
Timings = dict[str, dict[str, list[float]]]
"""Seconds by way ("plain", "negative"), then by stage or "total"."""


def bench(
    bundle: Bundle, engines: list[str], precision: str | None, threads: int | None, runs: int | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """A document of the measurements (see `measure_engine` and `cold_start`).

    Without a precision every variant is measured; the fastest of each graph, and the image time with them, are kept for engine "auto".
    "auto": the engine that "auto" takes from now on and its precisions, "remembered": whether that is by these measurements.
    `say` is told about each step. Raises what `load` and `Pipeline.generate` raise.
    """
    if runs is not None:
        integer("runs", runs, 1)
    for engine in engines:
        check_engine(engine)
    # Before the first is measured: that takes a while.
    selected = {engine: select_variants(bundle, engine, precision) for engine in engines}
    results: dict[str, dict[str, Any]] = {}
    for engine, fixed in selected.items():
        variants = {graph: [fixed[graph]] if precision else list(bundle.variants(graph, engine)) for graph in fixed}
        found = measure_engine(bundle, engine, variants, threads, runs, say)
        say(f"{engine}: two cold starts")
        chosen = ",".join(f"{graph}={name}" for graph, name in found["precision"].items())
        results[engine] = {**found, "cold_start": cold_start(bundle.folder, engine, chosen, threads, _prompt(bundle, 0))}
    cache, measured = Cache(), {}
    if precision is None and threads is None:
        measured = {engine: Measured(found["precision"], found["plain"]["total"]["p50"]) for engine, found in results.items()}
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
        return asdict(choose(bundle, cache))
    except (BundleError, EngineMissing):  # only engines that auto never takes by itself were measured
        return {"engine": None, "precision": {}}


def measure_engine(
    bundle: Bundle, engine: str, variants: dict[str, list[Variant]], threads: int | None, runs: int | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """What each variant takes, the fastest of each graph, and what an image takes with those, plain and with a negative prompt.

    "variants": by graph and precision the p50 and p95 in seconds; "precision": the fastest by graph; "plain" and "negative": p50 and p95 by
    stage and in "total"; "provider"; "runs": how many images each of the two figures is of.
    """
    rounds = max(map(len, variants.values()))
    taken: dict[str, dict[str, dict[str, float]]] = {graph: {} for graph in variants}
    with tempfile.TemporaryDirectory() as scratch:
        # Too small for the compiled form of a large model: that of variants that lose is nobody's.
        cache = Cache(Path(scratch), limit=2**28)

        def measure_variants(chosen: Variants, series: int) -> tuple[Timings, str]:
            say(f"{engine}: images with {format_precision(chosen)}")
            narrowed = replace(bundle, graphs={graph: (variant,) for graph, variant in chosen.items()})
            with open_pipeline(narrowed, engine, None, threads, cache) as pipe:
                return measure(pipe, runs, series), pipe.provider

        for round in range(rounds):
            places = {graph: min(round, len(each) - 1) for graph, each in variants.items()}
            chosen = {graph: variants[graph][place] for graph, place in places.items()}
            # The same prompts as long as the text encoder is the same: a large one need not run for those that are in the cache.
            timings, provider = measure_variants(chosen, places.get("text_encoder", 0))
            for graph, variant in chosen.items():
                taken[graph].setdefault(variant.precision, _percentiles(timings["plain"][graph]))
        best = {graph: min(each, key=lambda variant: taken[graph][variant.precision]["p50"]) for graph, each in variants.items()}
        if rounds > 1:
            timings, provider = measure_variants(best, rounds)
    ways = {way: {stage: _percentiles(seconds) for stage, seconds in stages.items()} for way, stages in timings.items()}
    precision = {graph: variant.precision for graph, variant in best.items()}
    return {"provider": provider, "variants": taken, "precision": precision, **ways, "runs": len(timings["plain"]["total"])}


def measure(pipe: Pipeline, runs: int | None, series: int = 0) -> Timings:
    """The seconds of each run by stage, "plain" and with a "negative", taken in turns so that both meet the same machine.

    Every prompt of a series is a new one, so the text encoder runs for every image; the negative prompt is encoded once, before.
    """
    bundle, first = pipe.bundle, 10_000 * series
    ways: dict[str, str | None] = {"plain": None}
    if bundle.guidance.kind != "none":
        ways["negative"] = NEGATIVE if "text_encoder" in bundle.graphs else _prompt(bundle, first)
    for negative in ways.values():
        pipe.generate(_prompt(bundle, first), negative, seed=0, truncate=True)
    timings: Timings = {way: {stage: [] for stage in (*STAGES, "total")} for way in ways}
    start = time.perf_counter()
    for run in range(RUNS if runs is None else runs):
        if runs is None and run >= LEAST and time.perf_counter() - start > SECONDS * len(ways):
            break
        for place, (way, negative) in enumerate(ways.items(), 1):
            prompt = _prompt(bundle, first + len(ways) * run + place)
            for stage, seconds in pipe.generate(prompt, negative, seed=run, truncate=True).timings.items():
                timings[way][stage].append(seconds)
    return timings


def cold_start(folder: Path, engine: str, precision: str | None, threads: int | None, prompt: str = PROMPT) -> dict[str, float | None]:
    """The seconds from process start to written PNG with an empty cache ("first") and again with what that left there.

    Also the first one's peak memory in bytes and that of the second ("peak_again"), None where the system does not say.
    """
    words = ["generate", prompt, "--bundle", str(folder), "--engine", engine, "--force", "--truncate"]
    words += [] if precision is None else ["--precision", precision]
    words += [] if threads is None else ["--threads", str(threads)]
    # Beside the real cache: compiled models take gigabytes, and the system's folder for temporary files may lie in memory.
    real = Cache()
    with tempfile.TemporaryDirectory(dir=None if real.problem() else real.path) as scratch:
        words += ["--output", str(Path(scratch) / "image.png")]
        environment = {**os.environ, "SNOOPI_RT_CACHE": str(Path(scratch) / "cache")}
        first, peak = _run(words, environment)
        again, peak_again = _run(words, environment)
    return {"first": first, "again": again, "peak_memory": peak, "peak_again": peak_again}


def table(document: dict[str, Any]) -> str:
    """The document as lines for people."""
    lines = [f"{'milliseconds':46}{'p50':>10}{'p95':>10}"]
    for engine, result in document["engines"].items():
        for graph, variants in result["variants"].items():
            for precision, taken in variants.items():
                fastest = "  fastest" if len(variants) > 1 and result["precision"][graph] == precision else ""
                lines.append(_line(f"{engine} {graph} {precision}", taken) + fastest)
        for way, words in ("plain", "an image"), ("negative", "an image with a negative prompt"):
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
    """Which engine `auto` takes from now on, and why it is not the fastest of these where nothing was remembered."""
    auto = document["auto"]
    takes = "takes none" if auto["engine"] is None else f"takes {auto['engine']} in {format_names(auto['precision'])}"
    if auto["remembered"]:
        return f"from now on --engine auto {takes}"
    problem = Cache().problem()
    why = f"nothing is kept in {Cache().path}: {problem}" if problem else "figures of a given --precision or --threads are not remembered"
    return f"--engine auto {takes}, as before: {why}"


def _line(words: str, taken: dict[str, float]) -> str:
    return f"{words:46}{1000 * taken['p50']:10.1f}{1000 * taken['p95']:10.1f}"


def _mebibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:.0f} MiB"


def _prompt(bundle: Bundle, number: int) -> str:
    """A prompt of its own for each number, all of one length, or one that the bundle knows where it has no text encoder."""
    if bundle.prompts is None or "text_encoder" in bundle.graphs:
        return f"{100_000 + number} {PROMPT}"
    return bundle.prompts.texts[number % len(bundle.prompts.texts)]


def _percentiles(seconds: list[float]) -> dict[str, float]:
    return {"p50": float(np.percentile(seconds, 50)), "p95": float(np.percentile(seconds, 95))}


def _run(words: list[str], environment: dict[str, str]) -> tuple[float, int | None]:
    """The wall-clock seconds of `snoopi-rt WORDS` and the peak memory in bytes that it tells, None where it tells none."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-P", "-c", COLD, *words], env=environment, stdout=subprocess.PIPE, encoding="utf-8", check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise EngineError(f"the cold start ended with code {done.returncode}: {join(['snoopi-rt', *words])}")
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", done.stdout, re.MULTILINE)
    return seconds, None if peak is None else int(peak[1]) * 1024
