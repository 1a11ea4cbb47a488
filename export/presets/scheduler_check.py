"""A preset checked against the scheduler file that came with the weights."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from typing import Any

from snoopi_rt.errors import InputError
from snoopi_rt.export.one_step import Prediction
from snoopi_rt.export.presets.preset import Preset, written
from snoopi_rt.export.weights.text_files import read_json

DIFFUSERS_PREDICTION: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}


def check_scheduler(preset: Preset, folder: Path) -> list[str]:
    """The fields of the preset that scheduler_config.json in the folder confirms, none where there is no such file.

    Raises InputError for a file that cannot be read and for the first field that it contradicts.
    """
    path = folder / "scheduler_config.json"
    if not path.exists() or preset.prediction == "flow":  # a flow is read in one step without any schedule
        return []
    with _reading(path):
        derived = _derived(read_json(path), preset)
    ours = _in_scheduler_terms(preset)
    for key in preset.from_scheduler:
        if not _close(ours[key], derived[key]):
            own, other = written(ours[key]), written(derived[key])
            raise InputError(
                f"preset {preset.name} has {key} {own}, but {path} gives {other}: "
                f"--set {key}={other} follows that file, --set {key}={own} keeps the preset's"
            )
    return list(preset.from_scheduler)


def follow_scheduler(preset: Preset, folder: Path, settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """The settings KEY=VALUE that make the preset agree with scheduler_config.json in the folder, and the fields that already do.

    The file states the prediction type and the schedule; and the timesteps and the input scale only where its spacing is "trailing", which
    starts from pure noise: otherwise the timesteps are the preset's and the noise is fed unscaled. What `settings` set is left alone.
    Raises InputError as check_scheduler does, also for a flow's scheduler: the file does not state the sign of its prediction.
    """
    path = folder / "scheduler_config.json"
    if not path.exists():
        return [], []
    scheduler = open_scheduler(path)
    prediction = DIFFUSERS_PREDICTION.get(scheduler.config.get("prediction_type", "epsilon"), "flow")
    cumprod = getattr(scheduler, "alphas_cumprod", None)
    if cumprod is None or prediction == "flow":
        return [], check_scheduler(preset, folder)
    by_hand, ours = {setting.partition("=")[0] for setting in settings}, _in_scheduler_terms(preset)
    theirs: dict[str, Any] = {"prediction": prediction}
    with _reading(path):
        if scheduler.config.get("timestep_spacing") == "trailing":
            with suppress(ValueError, IndexError):  # PNDM cannot take so few steps
                theirs["timestep"], theirs["input_scale"] = _first_step(scheduler, len(preset.timestep))
        timesteps = preset.timestep if "timestep" in by_hand else theirs.get("timestep", preset.timestep)
        theirs["alpha"] = _alphas(cumprod, preset, timesteps)
    agreed = [key for key in ours if key in theirs and key not in by_hand and _close(ours[key], theirs[key])]
    if not _close(ours["timestep"], timesteps):
        ours["alpha"] = ()  # that of another timestep
    theirs.setdefault("input_scale", 1.0)
    followed = [key for key in ours if key in theirs and key not in by_hand and not _close(ours[key], theirs[key])]
    return [f"{key}={written(theirs[key])}" for key in followed], agreed


def _derived(config: Any, preset: Preset) -> dict[str, Any]:
    """What diffusers' own scheduler makes of its configuration, in the preset's terms."""
    scheduler = _scheduler(config)
    cumprod = getattr(scheduler, "alphas_cumprod", None)  # schedulers of flows have none
    prediction = scheduler.config.get("prediction_type", "epsilon" if cumprod is not None else "flow_prediction")
    derived = {
        "prediction": DIFFUSERS_PREDICTION.get(prediction, prediction),
        "alpha": () if cumprod is None else _alphas(cumprod, preset, preset.timestep),
    }
    if not set(preset.from_scheduler) <= derived.keys():
        derived["timestep"], derived["input_scale"] = _first_step(scheduler, len(preset.timestep))
    return derived


def _alphas(cumprod: Any, preset: Preset, timesteps: Sequence[float]) -> tuple[float, ...]:
    if timesteps[0] >= len(cumprod):
        raise ValueError(f"it has {len(cumprod)} timesteps, preset {preset.name} asks for {timesteps[0]:g}")
    return tuple(float(cumprod[int(t)].sqrt()) for t in timesteps)


def _first_step(scheduler: Any, steps: int) -> tuple[tuple[float, ...], float]:
    """The timesteps at which a network is called for that many steps, and the scale of its first input."""
    import torch

    scheduler.set_timesteps(steps)
    start = torch.tensor(float(scheduler.init_noise_sigma))
    return tuple(float(t) for t in scheduler.timesteps), float(scheduler.scale_model_input(start, scheduler.timesteps[0]))


def open_scheduler(path: Path) -> Any:
    """The diffusers scheduler of a scheduler_config.json. Raises InputError for a file that is not there or cannot be read."""
    with _reading(path):
        return _scheduler(read_json(path))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns whatever a configuration makes diffusers raise into an InputError of one line that names the file."""
    try:
        with warnings.catch_warnings(action="ignore"):  # diffusers' own, about numpy
            yield
    except InputError:
        raise
    # What a scheduler makes of a value that it does not know differs by class.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"cannot read the schedule of {path}: {reason}") from error


def _in_scheduler_terms(preset: Preset) -> dict[str, Any]:
    """The preset in the terms of a scheduler."""
    return {
        "prediction": preset.prediction,
        "alpha": tuple(step.alpha for step in preset.rule.steps),
        "timestep": preset.timestep,
        "input_scale": preset.input_scale,
    }


def _scheduler(config: Any) -> Any:
    import diffusers

    kind = getattr(diffusers, config.get("_class_name", "DDPMScheduler"), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        kind = diffusers.DDPMScheduler  # a class of the checkpoint's own: its betas still follow the usual names
    return kind(**{key: config[key] for key in signature(kind).parameters if key in config})


def _close(ours: Any, derived: Any) -> bool:
    """Equal up to the float32 error of a thousand products: 1e-3, a quarter of the difference between 0.0047 and 0.00466."""
    if isinstance(ours, tuple):
        return len(ours) == len(derived) and all(map(_close, ours, derived))
    return ours == derived if isinstance(ours, str) else math.isclose(ours, derived, rel_tol=1e-3)
