"""How fast a bundle is on this machine: seconds by stage, cold start and peak memory, with and without a negative prompt."""

import os
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from snoopi_rt.bundle import Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.choice import remember
from snoopi_rt.engines.base import EngineError
from snoopi_rt.pipeline import STAGES, Pipeline, open_pipeline
from snoopi_rt.request import integer

PROMPT, NEGATIVE = "a red apple on a blue background", "blurry"
COLD = """
from snoopi_rt.cli import main
try:
    main(prog_name="snoopi-rt")
finally:
    try:
        print(open("/proc/self/status").read())
    except OSError:
        pass
"""
"""The command line as a program that tells its peak memory itself: on Linux, what `wait4` tells begins with the parent's."""


def bench(
    bundle: Bundle, engines: list[str], precision: str | None, threads: int | None, runs: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """A document of the measurements (see the functions below); what the engines took as they are is kept for engine "auto".

    `say` is told about each step. Raises what `load` and `Pipeline.generate` raise.
    """
    integer("runs", runs, 1)
    results: dict[str, dict[str, Any]] = {}
    for engine in engines:
        say(f"{engine}: {runs} images without and {runs} with a negative prompt")
        with tempfile.TemporaryDirectory() as scratch, open_pipeline(bundle, engine, precision, threads, Cache(Path(scratch))) as pipe:
            results[engine] = {"provider": pipe.provider, **measure(pipe, runs)}
        say(f"{engine}: two cold starts")
        results[engine]["cold_start"] = cold_start(bundle.folder, engine, precision, threads)
    if precision is None and threads is None:
        remember(bundle, Cache(), {engine: result["plain"]["total"]["p50"] for engine, result in results.items()})
    return {"bundle": bundle.name, "hash": bundle.hash, "precision": precision, "threads": threads, "runs": runs, "engines": results}


def measure(pipe: Pipeline, runs: int) -> dict[str, Any]:
    """The p50 and p95 in seconds by stage, "plain" and with a "negative", taken in turns so that both meet the same machine.

    Every prompt is a new one, so the text encoder runs for every image; the negative prompt is encoded once, before.
    """
    ways = {"plain": None} if pipe.bundle.guidance.kind == "none" else {"plain": None, "negative": NEGATIVE}
    for negative in ways.values():
        pipe.generate(PROMPT, negative, seed=0, truncate=True)
    timings: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for run in range(runs):
        for way, negative in ways.items():
            prompt = f"{secrets.randbelow(10**6)} {PROMPT}"
            timings[way].append(pipe.generate(prompt, negative, seed=run, truncate=True).timings)
    return {way: {stage: _percentiles([taken[stage] for taken in rows]) for stage in (*STAGES, "total")} for way, rows in timings.items()}


def cold_start(folder: Path, engine: str, precision: str | None, threads: int | None) -> dict[str, float | None]:
    """The seconds from process start to written PNG with an empty cache ("first") and again with what that left there.

    Also the first one's peak memory in bytes, None where the system does not say.
    """
    words = ["generate", PROMPT, "--bundle", str(folder), "--engine", engine, "--force", "--truncate"]
    words += [] if precision is None else ["--precision", precision]
    words += [] if threads is None else ["--threads", str(threads)]
    with tempfile.TemporaryDirectory() as scratch:
        words += ["--output", str(Path(scratch) / "image.png")]
        environment = {**os.environ, "SNOOPI_RT_CACHE": str(Path(scratch) / "cache")}
        first, peak = _run(words, environment)
        again, _ = _run(words, environment)
    return {"first": first, "again": again, "peak_memory": peak}


def table(document: dict[str, Any]) -> str:
    """The document as lines for people."""
    lines = [f"{'milliseconds, p50 / p95':24}" + "".join(f"{stage:>20}" for stage in (*STAGES, "total"))]
    for engine, result in document["engines"].items():
        for way in ("plain", "negative"):
            if way in result:
                cells = [f"{1000 * result[way][stage]['p50']:.1f} / {1000 * result[way][stage]['p95']:.1f}" for stage in (*STAGES, "total")]
                lines.append(f"{engine + ' ' + way:24}" + "".join(f"{cell:>20}" for cell in cells))
    for engine, result in document["engines"].items():
        start = result["cold_start"]
        memory = "unknown" if start["peak_memory"] is None else f"{start['peak_memory'] / 2**20:.0f} MiB"
        lines.append(f"{engine} cold start {start['first']:.2f} s, again {start['again']:.2f} s, peak memory {memory}")
    return "\n".join(lines)


def _percentiles(seconds: list[float]) -> dict[str, float]:
    return {"p50": float(np.percentile(seconds, 50)), "p95": float(np.percentile(seconds, 95))}


def _run(words: list[str], environment: dict[str, str]) -> tuple[float, int | None]:
    """The wall-clock seconds of `snoopi-rt WORDS` and the peak memory in bytes that it tells, None where it tells none."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-P", "-c", COLD, *words], env=environment, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise EngineError(f"the cold start ended with code {done.returncode}: {shlex.join(['snoopi-rt', *words])}")
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", done.stdout, re.MULTILINE)
    return seconds, None if peak is None else int(peak[1]) * 1024
