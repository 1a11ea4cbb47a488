"""What a diffusers scheduler makes of its configuration, in this project's terms (OneStepRule)."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from snoopi_rt.engines.messages import why
from snoopi_rt.errors import InputError
from snoopi_rt.export.one_step import Prediction
from snoopi_rt.export.weights.text_files import read_json

DIFFUSERS_PREDICTION: dict[str, Literal[Prediction, "trigflow"]] = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "velocity",
    "trigflow": "trigflow",
}


def open_scheduler(path: Path) -> Any:
    """The diffusers scheduler of a scheduler_config.json. Raises InputError for a file that is not there or cannot be read."""
    with reading(path):
        config: dict[str, Any] = {**read_json(path), "clip_sample": False, "thresholding": False}  # which are for pixels
        kind = _class(config)
        return kind(**{key: config[key] for key in signature(kind).parameters if key in config})


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever a configuration makes diffusers raise into an InputError of one line that names the file."""
    try:
        with warnings.catch_warnings(action="ignore"):  # diffusers' own, about numpy
            yield
    except InputError:
        raise
    # What a scheduler makes of a value that it does not know differs by class.
    except Exception as error:
        raise InputError(f"cannot read the schedule of {path}: {why(error)}") from error


def is_flow(scheduler: Any) -> bool:
    """Whether it goes in a straight line from noise to data: diffusers' FlowMatch classes, and solvers that are told to."""
    return hasattr(scheduler, "sigmas") and (not hasattr(scheduler, "alphas_cumprod") or bool(scheduler.config.get("use_flow_sigmas")))


def prediction_of(scheduler: Any) -> str:
    """What the network predicts; diffusers' own name of a kind that has none here."""
    stated = scheduler.config.get("prediction_type", "flow_prediction" if is_flow(scheduler) else "epsilon")
    return DIFFUSERS_PREDICTION.get(stated, stated)


def alphas_at(scheduler: Any, timesteps: Sequence[float]) -> tuple[float, ...]:
    """Its schedule at the timesteps, none if it has none. Raises ValueError for timesteps beyond its own."""
    count = scheduler.config.num_train_timesteps
    if is_flow(scheduler):
        return tuple(1 - t / count for t in timesteps)
    if not hasattr(scheduler, "alphas_cumprod"):
        return ()
    if timesteps[0] >= count:
        raise ValueError(f"it has {count} timesteps, {timesteps[0]:g} is not one of them")
    return tuple(float(scheduler.alphas_cumprod[int(t)].sqrt()) for t in timesteps)


def own_timesteps(scheduler: Any, steps: int) -> tuple[float, ...]:
    """Those at which it calls a network in that many steps. Raises ValueError or IndexError if it cannot take so few."""
    scheduler.set_timesteps(steps)
    timesteps = tuple(float(t) for t in scheduler.timesteps)
    if len(timesteps) != steps:
        raise ValueError(f"it calls the network {len(timesteps)} times for {steps} steps")
    return timesteps


def steps_of(scheduler: Any, timesteps: Sequence[float]) -> dict[str, Any]:
    """What it does at its own timesteps, which own_timesteps has set: input_scale, kept (one per later step) and end of OneStepRule.

    A step of first order is linear in its input, the network's prediction and new noise: random numbers tell the factors. Raises
    RuntimeError for other steps.
    """
    import torch

    alphas, prediction = alphas_at(scheduler, timesteps), prediction_of(scheduler)
    random = torch.Generator().manual_seed(0)
    scales, factors = zip(*(_factors(scheduler, t, random) for t in scheduler.timesteps), strict=True)
    ends = []
    for alpha, scale, following, (of_sample, of_prediction) in zip(alphas, scales, (*scales[1:], 1.0), factors, strict=True):
        sigma = 1 - alpha if is_flow(scheduler) else math.sqrt(1 - alpha**2)
        # What the prediction consists of, in x0 and noise.
        x0, noise = {"epsilon": (0.0, 1.0), "v": (-sigma, alpha), "x0": (1.0, 0.0), "velocity": (-1.0, 1.0)}[prediction]
        of_input, of_prediction = of_sample / scale * following, of_prediction * following
        signal, left = of_input * alpha + of_prediction * x0, of_input * sigma + of_prediction * noise
        ends.append((min(1.0, round(signal, 6)), max(0.0, round(left, 6))))
    *later, end = ends
    if any(abs(alpha - own) > 1e-3 for (alpha, _), own in zip(later, alphas[1:], strict=True)):
        raise RuntimeError("its steps end at other levels of noise than its timesteps have, which is not supported: name a --preset")
    start = float(getattr(scheduler, "init_noise_sigma", 1.0))
    return {"input_scale": start * scales[0], "kept": tuple(kept for _, kept in later), "end": end}


def _factors(scheduler: Any, t: Any, random: Any) -> tuple[float, tuple[float, float]]:
    """By how much it multiplies the network's input at its next timestep t, and what it steps to: the factors of sample and prediction."""
    import torch

    shape = (1, 4, 8, 8)
    scale_input = getattr(scheduler, "scale_model_input", lambda sample, t: sample)
    scale = float(scale_input(torch.ones(shape, dtype=torch.float64), t).mean())
    sample, prediction = torch.randn(2, *shape, generator=random, dtype=torch.float64)
    takes_noise = "generator" in signature(scheduler.step).parameters
    seeded = {"generator": torch.Generator().manual_seed(1)} if takes_noise else {}
    stepped = scheduler.step(prediction, t, sample, **seeded, return_dict=False)[0].double().flatten()
    fresh = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    columns = torch.stack([sample, prediction, fresh], -1).flatten(0, -2)
    solution = torch.linalg.lstsq(columns, stepped).solution
    if (stepped - columns @ solution).abs().max() > 1e-4 * stepped.abs().max():
        raise RuntimeError(f"its step at {float(t):g} also reads earlier predictions, which is not supported: name a --preset")
    return scale, (float(solution[0]), float(solution[1]))


def _class(config: dict[str, Any]) -> Any:
    import diffusers

    kind = getattr(diffusers, str(config.get("_class_name", "DDPMScheduler")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        return diffusers.DDPMScheduler  # a class of the checkpoint's own: its betas still follow the usual names
    return kind
