"""What a bundle costs on this machine: time per image, start, memory, size."""

import os
import resource
import sys
from collections.abc import Callable, Iterator

from snoopi_rt.diagnostics.bench import bench
from snoopi_rt.export.evaluation.report import Goal, ReportRow
from snoopi_rt.export.evaluation.samplers import Sampler

THREADS = 2


def cost(sampler: Sampler, runs: int | None, say: Callable[[str], None]) -> Iterator[ReportRow]:
    """Figures of a bundle on two threads, by the engine and in the precisions that drew; none of another sampler.

    Each tells how busy the machine was before: they mean something on an idle one only.
    """
    bundle = sampler.bundle
    if bundle is None:
        return
    engine, precision = sampler.facts["engine"], sampler.facts["precision"]
    machine = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    measured = bench(bundle, [engine], precision, THREADS, runs, say)["engines"][engine]
    for way, words, goal in (("plain", "an image", Goal(most=25)), ("negative", "an image with a negative", None)):
        if way in measured:
            milliseconds = {name: 1000 * seconds for name, seconds in measured[way]["total"].items()}
            yield ReportRow(
                "cost", words, milliseconds["p50"], goal, "ms", of=measured["runs"], detail={"p95": milliseconds["p95"], **machine}
            )
    start = measured["cold_start"]
    yield ReportRow("cost", "from start to PNG, with an empty cache", start["first"], None, "s", detail=machine)
    yield ReportRow("cost", "from start to PNG", start["again"], Goal(most=0.5), "s", detail=machine)
    if start["peak_memory"] is not None:
        yield ReportRow("cost", "peak memory", start["peak_memory"] / 1e6, Goal(most=250), "MB")
    size = sum(path.stat().st_size for path in bundle.folder.iterdir() if path.is_file())
    yield ReportRow("cost", "bundle", size / 1e6, Goal(most=60), "MB")


def peak_memory() -> int:
    """The most memory that this process has used so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
