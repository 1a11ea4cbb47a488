"""How much memory a step of PG-SB takes as its batch grows, and what that means for a batch that was not run.

python tools/random_student.py pixart --out runs/pixart
python tools/training_memory.py --backbone pixart --teacher runs/pixart --out docs/training_memory_pixart.json

On a GPU it is what torch allocates there, on a CPU this process's resident memory, libraries included.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch

from snoopi_rt.export.backbones import find_backbone
from snoopi_rt.export.training.processes import Processes
from snoopi_rt.export.training.recipes import DEFAULT, find_recipe
from snoopi_rt.export.training.schedule import Schedule
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.training.trainer import Trainer

GIB = 2**30
PROMPT = "a red fox on a mossy stone in the morning fog, seen from below"


@click.command()
@click.option("--backbone", required=True)
@click.option("--teacher", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 2, 3), show_default=True, help="In rising order, at least two.")
@click.option("--negative", help="A negative prompt: NASA-T, whose attentions are our kernel on a GPU.")
@click.option("--for-batch", "for_batch", default=16, show_default=True, help="The batch for which a figure is stated.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(backbone: str, teacher: Path, batches: Sequence[int], negative: str | None, for_batch: int, out: Path) -> None:
    """Print and write the peak of one step at each batch, and what the line through the two largest says of the for_batch one.

    Of small batches the peak may be that of the optimiser, which does not grow.
    """
    if len(batches) < 2 or sorted(set(batches)) != list(batches):
        raise click.UsageError("give at least two batches in rising order")
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.txt")
        prompts.write_text(f"{PROMPT}\n", encoding="utf-8")
        recipe = replace(find_recipe(DEFAULT[backbone]), batch=batches[0], negative_scale_max=0.0 if negative is None else 1.0)
        negatives = None
        if negative is not None:
            negatives = Path(folder, "negatives.txt")
            negatives.write_text(f"{negative}\n", encoding="utf-8")
        processes = Processes()
        task = Task(backbone, teacher, prompts, Path(folder, "run"), negatives=negatives)
        trainer = Trainer(task, recipe, find_backbone(backbone).denoiser(), Schedule.of(teacher), processes)
        trainer.step(0)  # the optimisers' moments and all libraries are there from now on
        rows = []
        for number, batch in enumerate(batches, 1):
            trainer.run.recipe = replace(recipe, batch=batch)
            forget_peak(processes.device)
            trainer.step(number)
            rows.append({"batch": batch, "peak": peak(processes.device)})
            click.echo(f"batch {batch:3}: {rows[-1]['peak'] / GIB:6.2f} GiB")
    largest = rows[-2:]
    slope, base = np.polyfit([row["batch"] for row in largest], [row["peak"] for row in largest], 1)
    stated = base + slope * for_batch
    click.echo(f"{base / GIB:.2f} GiB and {slope / GIB:.2f} per sample: {stated / GIB:.1f} GiB at {for_batch}")
    document = {
        "backbone": backbone,
        "device": device_name(processes.device),
        "rows": rows,
        "a sample": slope,
        "for_batch": for_batch,
        "stated": stated,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # makes the present resident memory the highest so far


def peak(device: torch.device) -> int:
    """Bytes since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} threads"


if __name__ == "__main__":
    main()
