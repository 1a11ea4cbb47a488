"""What attention to a text costs at best: OpenVINO's attention node alone, in bf16, beside the rate of its matrix products.

python tools/attention_speed.py --queries 1024 --tokens 300 --heads 16 --head-size 72 --layers 28    # SANA-Sprint 0.6 B at 1024 x 1024
"""

import statistics
import time
from typing import Any

import click
import numpy as np

from snoopi_rt.engines.openvino import import_openvino


@click.command()
@click.option("--queries", default=1024, help="Image tokens.")
@click.option("--tokens", default=[20, 300], multiple=True, help="Of the text; can be repeated.")
@click.option("--heads", default=16)
@click.option("--head-size", default=72)
@click.option("--layers", default=28)
@click.option("--runs", default=60)
def main(queries: int, tokens: tuple[int, ...], heads: int, head_size: int, layers: int, runs: int) -> None:
    """Print milliseconds of all layers, and operations per second."""
    op: Any = import_openvino().opset13
    random, width = np.random.RandomState(0), heads * head_size

    def parameter(*shape: int) -> Any:
        return op.parameter(list(shape), np.float32)

    for count in tokens:
        inputs = [parameter(1, heads, length, head_size) for length in (queries, count, count)]
        seconds = timed(op.scaled_dot_product_attention(*inputs), inputs, random, runs)
        rate = 4 * queries * count * width / seconds
        click.echo(f"attention to {count} tokens: {1e3 * layers * seconds:.0f} ms in {layers} layers, {rate / 1e9:.0f} GFLOP/s")
        hidden = parameter(count, width)
        seconds = timed(op.matmul(hidden, random.standard_normal((width, width)).astype(np.float32), False, False), [hidden], random, runs)
        rate = 2 * count * width**2 / seconds
        click.echo(f"their keys and values: {2e3 * layers * seconds:.0f} ms in {layers} layers, {rate / 1e9:.0f} GFLOP/s")


def timed(node: Any, inputs: list[Any], random: np.random.RandomState, runs: int) -> float:
    """The median seconds of a node on random inputs."""
    openvino = import_openvino()
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16"}
    request = openvino.Core().compile_model(openvino.Model([node], inputs), "CPU", hints).create_infer_request()
    arrays = [random.standard_normal(tuple(node.shape)).astype(np.float32) for node in inputs]
    taken = []
    for _ in range(runs + 5):
        start = time.perf_counter()
        request.infer(arrays)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[5:])


if __name__ == "__main__":
    main()
