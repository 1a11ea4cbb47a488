"""The training loop of every stage: step, log, sample, save, resume exactly, stop on NaN. It knows no loss and no network.

All randomness of step i depends on the seed and i alone (`random_stream`, and for each sample training/noise.py), so that a resumed run
repeats an unbroken one bit for bit.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from snoopi_rt.errors import InputError, OutputError
from snoopi_rt.export.settings import defaults, flattened
from snoopi_rt.export.training.processes import Processes
from snoopi_rt.export.training.stage_recipe import StageRecipe
from snoopi_rt.export.weights.files import save_tensors
from snoopi_rt.files import alone, remove_remains, write_whole
from snoopi_rt.interrupts import Interrupted, deferred


class Resumable(Protocol):
    """A part of a stage that a checkpoint holds, as named tensors."""

    def state(self) -> dict[str, Tensor]:
        """All that an exact resume needs."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` returned. Raises KeyError for a missing tensor."""


SAVE_EVERY_S = 120.0  # seconds of work that a kill may cost
SAVE_SHARE = 20  # at least this many times as long as a save took: a checkpoint of SD takes 14 GB


@dataclass(frozen=True)
class Stage:
    """One training run. A resumed run must have the same recipe and inputs."""

    name: str
    """What messages call it."""
    folder: Path
    """Where it writes."""
    recipe: StageRecipe
    """Its settings."""
    inputs: Mapping[str, str]
    """Fingerprints of what it reads, by name."""
    sample_every: int = 1000
    """Steps between pictures."""
    keep: int = 2
    """How many checkpoints stay."""
    stop_reason: Callable[[Mapping[str, float]], str | None] = lambda scalars: None
    """Why a run with these scalars must stop; None if it goes on."""
    former_names: Mapping[str, str] = field(default_factory=dict)
    """Names that settings had in older checkpoints, with their present ones."""

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints in the folder, the newest last."""
        return sorted((self.folder / "checkpoints").glob("[0-9]*.safetensors"))


def newest_average(folder: Path) -> dict[str, Tensor]:
    """The moving average of a one-network stage's newest checkpoint, by parameter, fp32; empty for a folder without checkpoints."""
    for path in sorted((folder / "checkpoints").glob("[0-9]*.safetensors"))[-1:]:
        return {name.partition("/average.")[2]: value for name, value in load_file(path).items() if "/average." in name}
    return {}


def random_stream(seed: int, *place: int | str) -> torch.Generator:
    """The random stream of one place in a run: of a step, or of one sample in it."""
    digest = hashlib.sha256("/".join(map(str, (seed, *place))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def run(
    stage: Stage,
    parts: Mapping[str, Resumable],
    step: Callable[[int, torch.Generator], dict[str, float]],
    sample: Callable[[Path], None],
    processes: Processes | None = None,
) -> None:
    """Runs `step(i, random)` for every step left. Writes checkpoints/, log.jsonl, tensorboard/ and samples/ in the stage's folder.

    `step` returns named scalars; `sample(path)` draws a picture of the present state. With several processes the main one writes, and all
    must get the same scalars. On the command line a signal to end, in whichever process, ends all after the running step, which is saved.
    Raises OutputError on NaN or infinity, for a `stage.stop_reason` and when the disk is full (the last checkpoint stays),
    and InputError when the folder's checkpoint was made by another recipe; only the number of steps may differ, if no fewer.
    """
    if processes is not None and not processes.main:
        start = _resume(stage, parts)
        with deferred() as signals:
            for i in range(start, stage.recipe.steps):
                _check(stage, i, step(i, random_stream(stage.recipe.seed, i)))
                stopping = _signal_to_end(signals, processes)
                if stopping and i + 1 < stage.recipe.steps:
                    raise stopping
        return
    with alone(stage.folder, "training"):
        start = _resume(stage, parts)
        try:
            _run(stage, parts, step, sample, start, processes)
        except OSError as error:
            kept = f"; {stage.checkpoints[-1]} is kept" if stage.checkpoints else ""
            raise OutputError(f"{stage.name} stopped: cannot write in {stage.folder}: {error.strerror or error}{kept}") from error


def _run(
    stage: Stage,
    parts: Mapping[str, Resumable],
    step: Callable[[int, torch.Generator], dict[str, float]],
    sample: Callable[[Path], None],
    start: int,
    processes: Processes | None,
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    steps, batch = stage.recipe.steps, stage.recipe.batch
    for name in ("samples", "checkpoints"):
        (stage.folder / name).mkdir(parents=True, exist_ok=True)
    remove_remains(stage.folder / "checkpoints")
    _cut_log(stage.folder / "log.jsonl", start)
    saved_at, took = time.monotonic(), 0.0
    with (
        open(stage.folder / "log.jsonl", "a", encoding="utf-8") as log,
        SummaryWriter(str(stage.folder / "tensorboard"), purge_step=start) as board,
        tqdm(total=steps * batch, initial=start * batch, unit="image", desc=stage.name, smoothing=0.05, mininterval=1.0) as bar,
        deferred() as signals,
    ):
        for i in range(start, steps):
            scalars = step(i, random_stream(stage.recipe.seed, i))
            _check(stage, i, scalars)
            log.write(json.dumps({"step": i, **{k: round(v, 9) for k, v in scalars.items()}}) + "\n")
            for name, value in scalars.items():
                board.add_scalar(name, value, i)
            bar.update(batch)
            bar.set_postfix({k: f"{v:.4g}" for k, v in scalars.items()}, refresh=False)
            done, stopping = i + 1, _signal_to_end(signals, processes)
            if done % stage.sample_every == 0 or done == steps:
                picture = stage.folder / "samples" / f"{done:07d}.png"
                sample(picture)
                board.add_image("samples", np.asarray(Image.open(picture).convert("RGB")), i, dataformats="HWC")
            if time.monotonic() - saved_at > max(SAVE_EVERY_S, SAVE_SHARE * took) or done == steps or stopping:
                log.flush()
                began = time.monotonic()
                _save(stage, parts, done)
                saved_at = time.monotonic()
                took = saved_at - began
            if stopping and done < steps:
                bar.write(f"{stage.name} stopped after {done} of {steps} steps: the same command resumes", file=sys.stderr)
                raise stopping


def _signal_to_end(signals: Sequence[Interrupted], processes: Processes | None) -> Interrupted | None:
    """The signal to end after this step, the same in all processes: the others would wait forever for one that left alone."""
    code = signals[0].code if signals else 0
    agreed = code if processes is None else processes.largest(code)
    if agreed == code:
        return signals[0] if signals else None
    return Interrupted(agreed - 128)


def _check(stage: Stage, i: int, scalars: Mapping[str, float]) -> None:
    infinite = [name for name, value in scalars.items() if not math.isfinite(value)]
    reason = f"{', '.join(infinite)} is not finite" if infinite else stage.stop_reason(scalars)
    if reason:
        kept = "; the last checkpoint is kept" if stage.checkpoints else ""
        raise OutputError(f"{stage.name} stopped at step {i}: {reason}{kept}")


def _save(stage: Stage, parts: Mapping[str, Resumable], step: int) -> None:
    tensors = {f"{name}/{key}": value for name, part in parts.items() for key, value in part.state().items()}
    path = stage.folder / "checkpoints" / f"{step:07d}.safetensors"
    save_tensors(path, tensors, {"step": str(step), "recipe": json.dumps(_identity(stage))})
    for old in stage.checkpoints[: -stage.keep]:
        old.unlink()


def _identity(stage: Stage) -> dict[str, object]:
    return {**flattened(stage.recipe), **stage.inputs}


def first_step(stage: Stage) -> int:
    """The first step not yet done. Raises InputError when the newest checkpoint is damaged or was made by another recipe."""
    if not stage.checkpoints:
        return 0
    with _newest(stage) as stored:
        metadata = stored.metadata()
        before, now = json.loads(metadata["recipe"]), json.loads(json.dumps(_identity(stage)))
    # With groups, `clip` is the fingerprint of that folder and no longer a setting that is in a group now.
    grouped = any("." in name for name in before)
    former = {old: new for old, new in stage.former_names.items() if not (grouped and "." in new)}
    before = {former.get(name, name): value for name, value in before.items()}
    before = {**defaults(stage.recipe), **before}  # settings that did not exist then
    done = int(metadata["step"])
    # A run may be made longer or shorter, but not than it is: from there on its learning rate is that of its new length.
    if now["steps"] >= done:
        before["steps"] = now["steps"]
    if before != now:
        pairs = {key: (before.get(key, "not set"), now.get(key, "not set")) for key in sorted({*before, *now})}
        changed = {key: f"{key} {old} -> {new}" for key, (old, new) in pairs.items() if old != new}
        if list(changed) == ["steps"]:
            raise InputError(f"{stage.folder} holds a {stage.name} after {done} steps, more than {now['steps']}: give at least as many")
        recipe = ", ".join(changed.values())
        raise InputError(f"{stage.folder} holds a {stage.name} of another recipe ({recipe}): use the same settings or another folder")
    return done


def _resume(stage: Stage, parts: Mapping[str, Resumable]) -> int:
    """The first step to do, after `parts` were restored from the newest checkpoint."""
    start = first_step(stage)
    if stage.checkpoints:
        with _newest(stage) as stored:
            for name, part in parts.items():
                names = [key for key in stored.keys() if key.startswith(f"{name}/")]  # noqa: SIM118 - safe_open is not a dict
                part.restore({key.removeprefix(f"{name}/"): stored.get_tensor(key) for key in names})
    return start


@contextmanager
def _newest(stage: Stage) -> Iterator[Any]:
    """The newest checkpoint, opened. Raises InputError when it is damaged."""
    path = stage.checkpoints[-1]
    try:
        with safe_open(path, framework="pt") as stored:
            yield stored
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it to resume from the checkpoint before it") from error


def _cut_log(path: Path, step: int) -> None:
    """Drops the lines that a killed run had written after its last checkpoint."""
    if path.exists():
        write_whole(path, b"".join(path.read_bytes().splitlines(keepends=True)[:step]))
