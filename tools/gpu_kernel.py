"""Times NASA attention on a GPU: our kernel against torch's own attention twice and a subtraction, forward and backward.

    python tools/gpu_kernel.py --out docs/gpu/kernel.json

What a card could do at most is measured in the same run: bytes a second of a copy, and products a second of a large matrix product. Both
branches' keys are read once and queries once, which is the least that must move: what is said of bandwidth counts that alone.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

RUNS = 50
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Layer:
    """A cross-attention layer of a student: heads, queries, head size, tokens of the prompt and of the negative."""

    name: str
    heads: int
    queries: int
    size: int
    tokens: int
    negative: int


LAYERS = (
    Layer("PixArt-512, 20 tokens", 16, 1024, 72, 20, 20),
    Layer("PixArt-512, 120 tokens", 16, 1024, 72, 120, 120),
    Layer("PixArt-1024, 300 tokens", 16, 4096, 72, 300, 300),
    Layer("SD 1.5, 64 x 64", 8, 4096, 40, 77, 77),
    Layer("SD 1.5, 32 x 32", 8, 1024, 80, 77, 77),
    Layer("SD 1.5, 16 x 16", 8, 256, 160, 77, 77),
    Layer("SD 2.1, 64 x 64", 5, 4096, 64, 77, 77),
    Layer("SD 2.1, 32 x 32", 10, 1024, 64, 77, 77),
)


@click.command()
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 8))
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16")
@click.option("--flex/--no-flex", default=True, help="Also FlexAttention twice, compiled: takes a minute.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(batches: tuple[int, ...], dtype: str, flex: bool, out: Path) -> None:
    """Print the table and write it as JSON."""
    if not torch.cuda.is_available():
        raise click.ClickException("no GPU that torch can use: nothing to time")
    from snoopi_rt.kernels.nasa import fused_nasa_attention

    most = {"GB/s": copied(), "TFLOP/s": multiplied(DTYPES[dtype])}
    document: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": dtype, "most": most, "rows": []}
    click.echo(f"{document['gpu']}, {dtype}: a copy moves {most['GB/s']:.0f} GB/s, a matrix product makes {most['TFLOP/s']:.0f} TFLOP/s")
    click.echo(
        f"{'layer':26}{'batch':>6}{'way':>8}{'kernel us':>11}{'2 x SDPA':>10}{'2 x flex':>10}{'times':>7}{'of GB/s':>9}{'of TFLOP/s':>11}"
    )
    for layer in LAYERS:
        for batch in batches:
            values = drawn(layer, batch, DTYPES[dtype])
            ways: dict[str, Callable[..., Tensor]] = {"kernel": fused_nasa_attention, "sdpa": twice_sdpa}
            if flex:
                ways["flex"] = twice_flex()
            for direction, made in (("forward", forward), ("both", both)):
                taken = interleaved({name: made(way, values) for name, way in ways.items()})
                document["rows"].append(row(layer, batch, direction, taken, most, values))
                say(document["rows"][-1])
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def drawn(layer: Layer, batch: int, dtype: torch.dtype) -> list[Any]:
    """The arguments of nasa_attention, without masks; heads lie as the networks' products leave them."""

    def draw(rows: int) -> Tensor:
        return torch.randn(batch, rows, layer.heads, layer.size, device="cuda", dtype=dtype).transpose(1, 2)

    return [
        draw(layer.queries),
        *(draw(layer.tokens) for _ in range(2)),
        None,
        *(draw(layer.negative) for _ in range(2)),
        None,
        torch.full((batch,), 0.5, device="cuda"),
    ]


def twice_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: None, k_neg: Tensor, v_neg: Tensor, mask_neg: None, scale: Tensor) -> Tensor:
    """What NASA is without a kernel of its own."""
    negative = scaled_dot_product_attention(q, k_neg, v_neg)
    return scaled_dot_product_attention(q, k, v) - scale.to(q.dtype)[:, None, None, None] * negative


def twice_flex() -> Callable[..., Tensor]:
    """The same through FlexAttention, compiled as one."""
    from torch.nn.attention.flex_attention import flex_attention

    def run(q: Tensor, k: Tensor, v: Tensor, mask: None, k_neg: Tensor, v_neg: Tensor, mask_neg: None, scale: Tensor) -> Any:
        return flex_attention(q, k, v) - scale.to(q.dtype)[:, None, None, None] * flex_attention(q, k_neg, v_neg)

    return torch.compile(run, dynamic=False)


def forward(way: Callable[..., Tensor], values: list[Any]) -> Callable[[], object]:
    return torch.no_grad()(lambda: way(*values))


def both(way: Callable[..., Tensor], values: list[Any]) -> Callable[[], object]:
    """Forward and backward, as a training step runs them."""
    leaves = [x.detach().requires_grad_() if x is not None else None for x in values]
    wanted = [x for x in leaves if x is not None]
    up = torch.randn_like(values[0])
    return lambda: torch.autograd.grad(way(*leaves), wanted, up)


def interleaved(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, called in turns."""
    for run in runs.values():
        for _ in range(3):
            run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(RUNS):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    return {name: statistics.median(each) for name, each in taken.items()}


def seconds(run: Callable[[], object], repeats: int = 10) -> float:
    """What one of several calls in a row takes on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def copied(size: int = 2**30) -> float:
    """Gigabytes a second that a copy reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / interleaved({"copy": lambda: target.copy_(source)})["copy"] / 1e9


def multiplied(dtype: torch.dtype, side: int = 8192) -> float:
    """10^12 additions and multiplications a second of a large product."""
    a, b = torch.randn(2, side, side, device="cuda", dtype=dtype)
    return 2 * side**3 / interleaved({"product": lambda: a @ b})["product"] / 1e12


def row(layer: Layer, batch: int, direction: str, taken: dict[str, float], most: dict[str, float], values: list[Any]) -> dict[str, Any]:
    """One line of the table. A forward reads all once and writes the output; both read them twice and write as many gradients."""
    tensors = [x for x in values[:-1] if x is not None]
    moved = sum(x.numel() * x.element_size() for x in [*tensors, values[0]]) * (1 if direction == "forward" else 3)
    products = (
        4 * batch * layer.heads * layer.queries * layer.size * (layer.tokens + layer.negative) * (1 if direction == "forward" else 3.5)
    )
    return {
        "layer": layer.name,
        "batch": batch,
        "direction": direction,
        "microseconds": {name: value * 1e6 for name, value in taken.items()},
        "of two SDPA": taken["sdpa"] / taken["kernel"],
        "megabytes": moved / 1e6,
        "of bandwidth": moved / taken["kernel"] / 1e9 / most["GB/s"],
        "of products": products / taken["kernel"] / 1e12 / most["TFLOP/s"],
    }


def say(line: dict[str, Any]) -> None:
    """One line for people."""
    taken = line["microseconds"]
    flex = f"{taken['flex']:10.1f}" if "flex" in taken else f"{'':10}"
    click.echo(
        f"{line['layer']:26}{line['batch']:6}{line['direction']:>8}{taken['kernel']:11.1f}{taken['sdpa']:10.1f}{flex}"
        f"{line['of two SDPA']:7.2f}{line['of bandwidth']:9.0%}{line['of products']:11.0%}"
    )


if __name__ == "__main__":
    main()
