"""A preset held against the scheduler file that came with the weights."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from snoopi_rt.engines.base import InputError
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
    ours = {
        "prediction": preset.prediction,
        "alpha": tuple(step.alpha for step in preset.rule.steps),
        "timestep": preset.timestep,
        "input_scale": preset.input_scale,
    }
    for key in preset.from_scheduler:
        if not _close(ours[key], derived[key]):
            said, meant = written(ours[key]), written(derived[key])
            raise InputError(
                f"preset {preset.name} has {key} {said}, but {path} gives {meant}: "
                f"--set {key}={meant} follows that file, --set {key}={said} keeps the preset's"
            )
    return list(preset.from_scheduler)


def _derived(config: Any, preset: Preset) -> dict[str, Any]:
    """What diffusers' own scheduler makes of its configuration, in the preset's terms."""
    import torch

    scheduler = _scheduler(config)
    cumprod = getattr(scheduler, "alphas_cumprod", None)  # schedulers of flows have none
    prediction = scheduler.config.get("prediction_type", "epsilon" if cumprod is not None else "flow_prediction")
    if cumprod is not None and preset.timestep[0] >= len(cumprod):
        raise ValueError(f"it has {len(cumprod)} timesteps, preset {preset.name} asks for {preset.timestep[0]:g}")
    derived = {
        "prediction": DIFFUSERS_PREDICTION.get(prediction, prediction),
        "alpha": () if cumprod is None else tuple(float(cumprod[int(t)].sqrt()) for t in preset.timestep),
    }
    if not set(preset.from_scheduler) <= derived.keys():
        scheduler.set_timesteps(len(preset.timestep))
        start = torch.tensor(float(scheduler.init_noise_sigma))
        derived["timestep"] = tuple(float(t) for t in scheduler.timesteps)
        derived["input_scale"] = float(scheduler.scale_model_input(start, scheduler.timesteps[0]))
    return derived


def open_scheduler(path: Path) -> Any:
    """The diffusers scheduler of a scheduler_config.json. Raises InputError for a file that is not there or cannot be read."""
    with _reading(path):
        return _scheduler(read_json(path))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings(action="ignore"):  # diffusers' own, about numpy
            yield
    except InputError:
        raise
    # What a scheduler makes of a value that it does not know differs by class.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"cannot read the schedule of {path}: {reason}") from error


def _scheduler(config: Any) -> Any:
    import diffusers

    kind = getattr(diffusers, config.get("_class_name", "DDPMScheduler"), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        kind = diffusers.DDPMScheduler  # a class of the checkpoint's own: its betas still follow the usual names
    return kind(**{key: config[key] for key in signature(kind).parameters if key in config})


def _close(ours: Any, derived: Any) -> bool:
    """Equal up to what float32 loses over a thousand products: 1e-3, a quarter of what 0.0047 in place of 0.00466 changes."""
    if isinstance(ours, tuple):
        return len(ours) == len(derived) and all(map(_close, ours, derived))
    return ours == derived if isinstance(ours, str) else math.isclose(ours, derived, rel_tol=1e-3)
