"""Times NASA attention on a GPU: our kernel against torch's own attention twice and a subtraction, forward and backward.

    python tools/gpu_kernel.py --out docs/gpu/kernel.json

What a card could do at most is measured in the same run: bytes per second of a copy, and products per second of a large matrix product.
Both branches' keys are read once and queries once, which is the least that must move: shares of bandwidth count that alone, and may pass
the copy's where all of it lies in the card's cache. Each call is timed inside a CUDA graph of many, so that Python's launches do not count.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import gpu_timing
import torch
from gpu_timing import Run, apart, gpu_name, interleaved, recorded
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from snoopi_rt.kernels.nasa import fused_nasa_attention

TIMES = 20
"""How often each graph is timed."""
CALLS = 20
"""Calls in a graph."""
COPIED, SIDE = 2**30, 8192
"""Bytes of the copy, and sides of the matrices, that say what the card can do."""
TOLERANCE = 0.05
"""Relative difference between kernel and SDPA above which a time means nothing; bf16 keeps 8 bits."""
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
@click.option("--flex/--no-flex", default=False, help="Also FlexAttention twice, compiled: takes minutes.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(batches: tuple[int, ...], dtype: str, flex: bool, out: Path) -> None:
    """Print the table and write it as JSON, line by line as it is measured."""
    gpu = gpu_name()
    out.parent.mkdir(parents=True, exist_ok=True)
    with gpu_timing.DEVICE:
        most = {"GB/s": copied(), "TFLOP/s": multiplied(DTYPES[dtype])}
        document: dict[str, Any] = {"gpu": gpu, "torch": torch.__version__, "dtype": dtype, "most": most, "rows": []}
        click.echo(f"{gpu}, {dtype}: a copy moves {most['GB/s']:.0f} GB/s, a matrix product makes {most['TFLOP/s']:.0f} TFLOP/s")
        click.echo(
            f"{'layer':26}{'batch':>6}{'direction':>10}{'kernel us':>11}{'2 x SDPA':>10}{'2 x flex':>10}{'times':>7}"
            f"{'of GB/s':>9}{'of TFLOP/s':>11}{'apart':>9}"
        )
        for layer in LAYERS:
            for batch in batches:
                inputs = draw(layer, batch, DTYPES[dtype])
                attentions: dict[str, Callable[..., Tensor]] = {"kernel": fused_nasa_attention, "sdpa": twice_sdpa}
                if flex:
                    attentions["flex"] = twice_flex()
                for direction, prepare in (("forward", forward), ("both", both)):
                    difference = compared(prepare, inputs)
                    runs = {name: recorded(prepare(attention, inputs), CALLS) for name, attention in attentions.items()}
                    taken = {name: value / CALLS for name, value in interleaved(runs, TIMES).items()}
                    document["rows"].append(row(layer, batch, direction, taken, most, inputs, difference))
                    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
                    click.echo(line(document["rows"][-1]))


def draw(layer: Layer, batch: int, dtype: torch.dtype) -> list[Any]:
    """The arguments of nasa_attention, without masks; heads lie as the networks' products leave them."""

    def rows(count: int) -> Tensor:
        return torch.randn(batch, count, layer.heads, layer.size, dtype=dtype).transpose(1, 2)

    return [
        rows(layer.queries),
        *(rows(layer.tokens) for _ in range(2)),
        None,
        *(rows(layer.negative) for _ in range(2)),
        None,
        torch.full((batch,), 0.5),
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


def forward(attention: Callable[..., Tensor], inputs: list[Any]) -> Run:
    """A call without gradients; gives a list of its result."""

    @torch.no_grad()
    def run() -> list[Tensor]:
        return [attention(*inputs)]

    return run


def both(attention: Callable[..., Tensor], inputs: list[Any]) -> Run:
    """Forward and backward, as a training step runs them; gives the gradients."""
    leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
    outer = torch.ones_like(inputs[0])
    return lambda: torch.autograd.grad(attention(*leaves), [x for x in leaves if x is not None], outer)


def compared(prepare: Callable[..., Run], inputs: list[Any]) -> float:
    """The largest relative difference between what kernel and SDPA give. Raises ClickException if the kernel is wrong."""
    pairs = zip(prepare(fused_nasa_attention, inputs)(), prepare(twice_sdpa, inputs)(), strict=True)
    difference = max(apart(ours, theirs) for ours, theirs in pairs)
    if not difference < TOLERANCE:
        raise click.ClickException(f"the kernel is wrong: {difference:.2g} apart from SDPA, at most {TOLERANCE} is right")
    return difference


def copied() -> float:
    """Gigabytes per second that a copy reads and writes."""
    source = torch.empty(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPIED / interleaved({"copy": lambda: target.copy_(source)}, TIMES)["copy"] / 1e9


def multiplied(dtype: torch.dtype) -> float:
    """10^12 additions and multiplications per second of a large product."""
    a, b = torch.randn(2, SIDE, SIDE, dtype=dtype)
    return 2 * SIDE**3 / interleaved({"product": lambda: a @ b}, TIMES)["product"] / 1e12


def row(
    layer: Layer, batch: int, direction: str, taken: dict[str, float], most: dict[str, float], inputs: list[Any], difference: float
) -> dict[str, Any]:
    """One line of the table. A forward reads all once and writes the output; both read them twice and write as many gradients."""
    tensors = [x for x in inputs[:-1] if x is not None]
    moved = sum(x.numel() * x.element_size() for x in [*tensors, inputs[0]]) * (1 if direction == "forward" else 3)
    products = 4 * batch * layer.heads * layer.queries * layer.size * (layer.tokens + layer.negative)
    products *= 1 if direction == "forward" else 3.5
    return {
        "layer": layer.name,
        "batch": batch,
        "direction": direction,
        "microseconds": {name: value * 1e6 for name, value in taken.items()},
        "of two SDPA": taken["sdpa"] / taken["kernel"],
        "megabytes": moved / 1e6,
        "of bandwidth": moved / taken["kernel"] / 1e9 / most["GB/s"],
        "of products": products / taken["kernel"] / 1e12 / most["TFLOP/s"],
        "apart": difference,
    }


def line(row: dict[str, Any]) -> str:
    """The row for people."""
    taken = row["microseconds"]
    flex = f"{taken['flex']:10.1f}" if "flex" in taken else f"{'':10}"
    return (
        f"{row['layer']:26}{row['batch']:6}{row['direction']:>10}{taken['kernel']:11.1f}{taken['sdpa']:10.1f}{flex}"
        f"{row['of two SDPA']:7.2f}{row['of bandwidth']:9.0%}{row['of products']:11.0%}{row['apart']:9.1e}"
    )


if __name__ == "__main__":
    main()
