"""Times implementations of a guided cross-attention in a graph: milliseconds per layer without and with a negative prompt.

A stack of cross-attentions with their projections, as one graph, in bf16 on OpenVINO and in fp32 on ONNX Runtime.
python tools/attention_layouts.py --queries 1024 --heads 16 --head-size 72 --tokens 20 --negative-tokens 20
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from snoopi_rt.engines import load_engine
from snoopi_rt.export.attention import merge_heads, split_heads
from snoopi_rt.export.onnx_graphs.write import write_graph
from snoopi_rt.kernels import attention, fused_attention, nasa_attention, transposed_attention

IMPLEMENTATIONS = {"written out": attention, "fused": fused_attention, "transposed": transposed_attention}
ENGINES = (("openvino", "bf16"), ("cpu", "fp32"))


class Stack(nn.Module):
    """`layers` guided cross-attentions, one after the other."""

    def __init__(self, attention: Callable[..., Tensor], layers: int, heads: int, width: int):
        super().__init__()
        self.attention, self.heads = attention, heads
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in range(4)) for _ in range(layers))

    def forward(
        self, hidden: Tensor, prompt_states: Tensor, negative_states: Tensor | None = None, negative_scale: Tensor | None = None
    ) -> Tensor:
        t = prompt_states.shape[1]
        states = prompt_states if negative_states is None else torch.cat([prompt_states, negative_states], 1)
        for query, key, value, out in self.layers:
            q, k, v = (split_heads(x, self.heads) for x in (query(hidden), key(states), value(states)))
            if negative_scale is None:
                z = self.attention(q, k, v)
            else:
                z = nasa_attention(q, k[:, :, :t], v[:, :, :t], None, k[:, :, t:], v[:, :, t:], None, negative_scale, self.attention)
            hidden = hidden + out(merge_heads(z))
        return hidden


@click.command()
@click.option("--queries", default=1024)
@click.option("--heads", default=16)
@click.option("--head-size", default=72)
@click.option("--tokens", default=20)
@click.option("--negative-tokens", default=20)
@click.option("--layers", default=8)
@click.option("--runs", default=15, help="Timed calls of each, interleaved.")
def main(queries: int, heads: int, head_size: int, tokens: int, negative_tokens: int, layers: int, runs: int) -> None:
    """Print the medians."""
    width = heads * head_size
    torch.manual_seed(0)
    inputs = {
        "hidden": torch.randn(1, queries, width),
        "prompt_states": torch.randn(1, tokens, width),
        "negative_states": torch.randn(1, negative_tokens, width),
        "negative_scale": torch.full((1,), 0.5),
    }
    positive = {name: inputs[name] for name in ("hidden", "prompt_states")}
    dynamic = {"prompt_states": {1: "tokens"}, "negative_states": {1: "negative_tokens"}}
    calls: dict[tuple[str, str, bool], Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, implementation in IMPLEMENTATIONS.items():
            for guided, example in ((False, positive), (True, inputs)):
                path = Path(folder) / f"{name}-{guided}.onnx"
                write_graph(Stack(implementation, layers, heads, width), example, ("out",), dynamic, path)
                arrays = {key: value.numpy() for key, value in example.items()}
                for engine, precision in ENGINES:
                    calls[engine, name, guided] = partial(load_engine(engine, path, precision), **arrays)
        milliseconds: dict[tuple[str, str, bool], list[float]] = {key: [] for key in calls}
        for run in range(runs + 2):
            for key, call in calls.items():
                start = time.perf_counter()
                call()
                if run >= 2:
                    milliseconds[key].append(1000 * (time.perf_counter() - start) / layers)
    click.echo(f"{'milliseconds per layer':24}{'positive':>10}{'negative':>10}{'extra':>10}")
    for engine, precision in ENGINES:
        for name in IMPLEMENTATIONS:
            one, two = (statistics.median(milliseconds[engine, name, guided]) for guided in (False, True))
            click.echo(f"{engine + ' ' + precision + ' ' + name:24}{one:10.3f}{two:10.3f}{two - one:10.3f}")


if __name__ == "__main__":
    main()
