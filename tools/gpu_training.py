"""Times a student's forward and backward with NASA inside on a GPU: as two attentions, and through our kernel.

    python tools/gpu_training.py --student sd21 --out docs/gpu/training.json

True architectures with random weights, bf16, all of a student trained. `apart` is how far the gradient of the first attention's query
weights through the kernel lies from that through two attentions, of its own size. A whole step of PG-SB is tools/training_memory.py.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import gpu_timing
import torch
from gpu_students import NETWORKS, Case, case, student
from gpu_timing import Run, apart, gpu_name, interleaved, peak
from torch import Tensor, nn

from snoopi_rt.engines.messages import why
from snoopi_rt.export.attention import GuidedAttention
from snoopi_rt.export.backbones import find_backbone
from snoopi_rt.export.guidance import find_guidance
from snoopi_rt.kernels import fused_attention
from snoopi_rt.kernels.nasa import fused_nasa_attention

TIMES = 10
"""How often each is timed."""
TIMESTEP = 999


@click.command()
@click.option("--student", "kinds", type=click.Choice(list(NETWORKS)), multiple=True, default=tuple(NETWORKS))
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 8))
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(kinds: tuple[str, ...], batches: tuple[int, ...], out: Path) -> None:
    """Print the table and write it as JSON, line by line as it is measured."""
    document: dict[str, Any] = {"gpu": gpu_name(), "torch": torch.__version__, "rows": []}
    out.parent.mkdir(parents=True, exist_ok=True)
    click.echo(f"{'student':8}{'batch':>6}{'two attentions ms':>19}{'kernel ms':>11}{'times':>7}{'GB':>7}{'apart':>9}")
    with gpu_timing.DEVICE:
        for kind in kinds:
            network = student(kind)
            for batch in batches:
                document["rows"].append(measured(network, case(kind, network, batch, True, torch.bfloat16)))
                out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
                click.echo(line(document["rows"][-1]))


def measured(network: nn.Module, case: Case) -> dict[str, Any]:
    """Median seconds of both ways in turns, and the most memory that torch held. A lack of memory is a row that says so."""
    row = {"student": case.kind, "batch": len(case.noise)}
    try:
        with peak() as gigabytes:
            steps = {"two attentions": step(network, case, None), "kernel": step(network, case, fused_nasa_attention)}
            difference = apart(steps["kernel"](), steps["two attentions"]())
            seconds = interleaved(steps, TIMES)
    except torch.OutOfMemoryError as error:
        return {**row, "why not": why(error)}
    return {**row, **seconds, "GB": gigabytes[0], "apart": difference}


def step(network: nn.Module, case: Case, attend: Callable[..., Tensor] | None) -> Run:
    """A forward and a backward of a copy of the network; gives one layer's gradient."""
    assert case.negative is not None
    trained = copy.deepcopy(network).bfloat16().requires_grad_(True)
    trained.set_attn_processor(GuidedAttention(find_guidance("nasa"), torch.empty(0), fused_attention, attend))
    predict, timestep = find_backbone(case.kind).denoiser().predict, torch.full((len(case.noise),), TIMESTEP)
    query = next(parameter for name, parameter in trained.named_parameters() if name.endswith("attn2.to_q.weight"))
    states, scale = case.negative

    def run() -> Tensor:
        trained.zero_grad()
        predict(trained, case.noise, timestep, case.states, None, (states, None, scale)).float().square().mean().backward()
        return query.grad

    return run


def line(row: dict[str, Any]) -> str:
    """The row for people."""
    name = f"{row['student']:8}{row['batch']:6}"
    if "why not" in row:
        return f"{name}  {row['why not']}"
    two, kernel = row["two attentions"] * 1e3, row["kernel"] * 1e3
    return f"{name}{two:19.2f}{kernel:11.2f}{two / kernel:7.2f}{row['GB']:7.1f}{row['apart']:9.1e}"


if __name__ == "__main__":
    main()
