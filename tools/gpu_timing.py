"""Time and memory of work on a GPU: the one place where the scripts of gpu_check.sh talk to torch.cuda.

tests/gpu/test_gpu_scripts.py puts a device that is not there in the place of DEVICE and of what is called here, and runs every line.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click
import torch
from torch import Tensor

Run = Callable[[], Any]
DEVICE = torch.device("cuda")
WARM_UP = 3


def gpu_name() -> str:
    """The name of the GPU. Raises ClickException where torch can use none."""
    if not torch.cuda.is_available():
        raise click.ClickException("no GPU that torch can use: nothing to time")
    return torch.cuda.get_device_name()


def recorded(run: Run, repeats: int = 1) -> Run:
    """So many calls in a row as one CUDA graph, without the time that Python takes to launch them; gives what the last one gave."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and chosen before, and not on the stream that is recorded
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            output = run()

    def replay() -> Any:
        graph.replay()
        return output

    return replay


def interleaved(runs: Mapping[str, Run], times: int) -> dict[str, float]:
    """Median seconds of each, their calls interleaved."""
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(times):
        for name, run in runs.items():
            samples[name].append(seconds(run))
    return {name: statistics.median(values) for name, values in samples.items()}


def seconds(run: Run) -> float:
    """From the start of a call until the GPU has done all that it asked for."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@contextmanager
def peak() -> Iterator[list[float]]:
    """The most gigabytes that torch held meanwhile, in the list when the block ends."""
    gigabytes: list[float] = []
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield gigabytes
    gigabytes.append(torch.cuda.max_memory_allocated() / 1e9)


def apart(result: Tensor, expected: Tensor) -> float:
    """The size of the difference, of that of what is expected: 0 for equal tensors, 1 for zeros."""
    return ((result.float() - expected.float()).norm() / expected.float().norm()).item()
