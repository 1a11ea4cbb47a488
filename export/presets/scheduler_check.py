"""A preset checked against the scheduler file that came with the weights, or corrected by it."""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from snoopi_rt.errors import InputError
from snoopi_rt.export.presets.preset import Preset, written
from snoopi_rt.export.presets.scheduler import alphas_at, is_flow, open_scheduler, own_timesteps, prediction_of, reading, steps_of


def check_scheduler(preset: Preset, folder: Path) -> list[str]:
    """The fields of the preset that scheduler_config.json in the folder confirms, none if there is no such file.

    Raises InputError for a file that cannot be read and for the first field that it contradicts.
    """
    path = folder / "scheduler_config.json"
    if not path.exists() or preset.prediction == "reversed_velocity":  # which is no scheduler's
        return []
    scheduler = open_scheduler(path)
    with reading(path):
        theirs: dict[str, Any] = {"prediction": prediction_of(scheduler), "alpha": alphas_at(scheduler, preset.timestep)}
        if not set(preset.from_scheduler) <= theirs.keys():
            theirs["timestep"] = own_timesteps(scheduler, len(preset.timestep))
            theirs |= steps_of(scheduler, theirs["timestep"])
    ours = _in_scheduler_terms(preset)
    for key in preset.from_scheduler:
        if not _close(ours[key], theirs[key]):
            own, other = written(ours[key]), written(theirs[key])
            raise InputError(
                f"preset {preset.name} has {key} {own}, but {path} gives {other}: "
                f"--set {key}={other} follows that file, --set {key}={own} keeps the preset's"
            )
    return [key for key in preset.from_scheduler if ours[key] != ()]


def follow_scheduler(preset: Preset, folder: Path, settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """The settings KEY=VALUE that make the preset agree with scheduler_config.json in the folder, and the fields that already do.

    The file states the prediction type and the schedule. The rest (timesteps, input scale, what is kept of the noise, where the last step
    ends) it states only if its own steps start from pure noise: with the spacing "trailing", for a flow, or if they are the preset's own.
    Otherwise, and for other timesteps set by hand, the timesteps are the preset's and the noise is fed unscaled. What `settings` set is
    left alone.
    Raises InputError as check_scheduler does.
    """
    path = folder / "scheduler_config.json"
    if not path.exists():
        return [], []
    by_hand, ours = {setting.partition("=")[0] for setting in settings}, _in_scheduler_terms(preset)
    scheduler = open_scheduler(path)
    with reading(path):
        if (prediction := prediction_of(scheduler)) == "velocity" and not is_flow(scheduler):
            raise ValueError("it predicts a flow, but its sigmas are not those of a flow")
        theirs: dict[str, Any] = {"prediction": prediction}
        own: tuple[float, ...] = ()
        with suppress(ValueError, IndexError):  # PNDM cannot take so few steps, SCM cannot be asked
            own = own_timesteps(scheduler, len(preset.timestep))
        from_pure_noise = bool(own) and (scheduler.config.get("timestep_spacing") == "trailing" or is_flow(scheduler))
        timesteps = own if from_pure_noise and "timestep" not in by_hand else preset.timestep
        if _close(timesteps, own):
            theirs |= {"timestep": own, **steps_of(scheduler, own)}
        if alphas := alphas_at(scheduler, timesteps):
            theirs["alpha"] = alphas
    agreed = [key for key in ours if key in theirs and key not in by_hand and ours[key] != () and _close(ours[key], theirs[key])]
    if not _close(ours["timestep"], timesteps):
        ours["alpha"] = ()  # that of another timestep
    theirs.setdefault("input_scale", 1.0)
    followed = [key for key in ours if key in theirs and key not in by_hand and not _close(ours[key], theirs[key])]
    return [f"{key}={written(theirs[key])}" for key in followed], agreed


def _in_scheduler_terms(preset: Preset) -> dict[str, Any]:
    """The preset in the terms of a scheduler."""
    return {
        "prediction": preset.prediction,
        "alpha": tuple(step.alpha for step in preset.rule.steps),
        "timestep": preset.timestep,
        "input_scale": preset.input_scale,
        "kept": tuple(step.kept for step in preset.rule.later),
        "end": preset.end,
    }


def _close(ours: Any, theirs: Any) -> bool:
    """Equal up to the float32 error of a thousand products: 1e-3, a quarter of the difference between 0.0047 and 0.00466."""
    if isinstance(ours, tuple):
        return len(ours) == len(theirs) and all(map(_close, ours, theirs))
    return ours == theirs if isinstance(ours, str) else math.isclose(ours, theirs, rel_tol=1e-3, abs_tol=1e-5)
