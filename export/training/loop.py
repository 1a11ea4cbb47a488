"""The loop that every training stage shares: step, log, sample, save, resume exactly, stop on NaN. Knows no loss and no network.

All randomness of step i comes from `generator(seed, i)`, so a resumed run needs no random state and repeats an unbroken one bit for bit.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from snoopi_rt.engines.base import InputError, OutputError
from snoopi_rt.export.weights import save_tensors
from snoopi_rt.files import write_whole
from snoopi_rt.request import integer


class Resumable(Protocol):
    """What a checkpoint holds of a stage, as flat named tensors."""

    def state(self) -> dict[str, Tensor]: ...
    def restore(self, state: dict[str, Tensor]) -> None: ...


SAVE_EVERY_S = 120.0  # seconds of work that a kill may cost


@dataclass(frozen=True)
class Recipe:
    """Settings that every stage has; each stage adds its own and their defaults. Raises InputError for a value out of range."""

    steps: int
    batch: int
    lr: float
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            integer(name, getattr(self, name), 1)
        integer("seed", self.seed, 0)
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr must be a positive number, got {self.lr}")


@dataclass(frozen=True)
class Stage:
    """One training run: where it writes, its recipe, and the fingerprints of what it reads. A resumed run must have the same of both."""

    name: str
    folder: Path
    recipe: Recipe
    inputs: Mapping[str, str]
    sample_every: int = 1000


def generator(seed: int, step: int) -> torch.Generator:
    """The random stream of one step."""
    digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def run(
    stage: Stage,
    parts: Mapping[str, Resumable],
    step: Callable[[int, torch.Generator], dict[str, float]],
    sample: Callable[[Path], None],
) -> None:
    """Runs `step(i, generator)` for every step not yet done and leaves checkpoint.safetensors, log.jsonl and samples/ in its folder.

    `step` returns named scalars; `sample(path)` draws a picture of the present state. Raises OutputError on NaN or infinity (the last
    checkpoint stays), InputError where the folder's checkpoint was made by another recipe.
    """
    steps, batch = stage.recipe.steps, stage.recipe.batch
    stage.folder.mkdir(parents=True, exist_ok=True)
    (stage.folder / "samples").mkdir(exist_ok=True)
    checkpoint = stage.folder / "checkpoint.safetensors"
    start = _resume(checkpoint, stage, parts)
    _cut_log(stage.folder / "log.jsonl", start)
    saved_at = time.monotonic()
    with (
        open(stage.folder / "log.jsonl", "a") as log,
        tqdm(total=steps * batch, initial=start * batch, unit="image", desc=stage.name, smoothing=0.05, mininterval=1.0) as bar,
    ):
        for i in range(start, steps):
            scalars = step(i, generator(stage.recipe.seed, i))
            wrong = [name for name, value in scalars.items() if not math.isfinite(value)]
            if wrong:
                raise OutputError(f"{stage.name} stopped at step {i}: {', '.join(wrong)} is not finite; the last checkpoint is kept")
            log.write(json.dumps({"step": i, **{k: round(v, 9) for k, v in scalars.items()}}) + "\n")
            bar.update(batch)
            bar.set_postfix({k: f"{v:.4g}" for k, v in scalars.items()}, refresh=False)
            done = i + 1
            if done % stage.sample_every == 0 or done == steps:
                sample(stage.folder / "samples" / f"{done:07d}.png")
            if time.monotonic() - saved_at > SAVE_EVERY_S or done == steps:
                log.flush()
                _save(checkpoint, stage, parts, done)
                saved_at = time.monotonic()


def _save(path: Path, stage: Stage, parts: Mapping[str, Resumable], step: int) -> None:
    tensors = {f"{name}/{key}": value for name, part in parts.items() for key, value in part.state().items()}
    save_tensors(path, tensors, {"step": str(step), "recipe": json.dumps(_identity(stage))})


def _identity(stage: Stage) -> dict[str, object]:
    return {**asdict(stage.recipe), **stage.inputs}


def _resume(path: Path, stage: Stage, parts: Mapping[str, Resumable]) -> int:
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as stored:
        metadata = stored.metadata()
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - safe_open is not a dict
    before, now = json.loads(metadata["recipe"]), json.loads(json.dumps(_identity(stage)))
    if before != now:
        changed = ", ".join(f"{k} {before.get(k)} -> {now.get(k)}" for k in sorted({*before, *now}) if before.get(k) != now.get(k))
        raise InputError(f"{stage.folder} holds a {stage.name} of another recipe ({changed}); use the same settings or another folder")
    for name, part in parts.items():
        part.restore({key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")})
    return int(metadata["step"])


def _cut_log(path: Path, step: int) -> None:
    """Drops the lines that a killed run wrote after its last checkpoint."""
    if path.exists():
        write_whole(path, b"".join(path.read_bytes().splitlines(keepends=True)[:step]))
