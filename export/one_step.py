"""From a network's predictions to a clean latent: in one step, or in a few with fresh or predicted noise between them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Prediction = Literal["epsilon", "v", "x0", "velocity", "reversed_velocity"]


@dataclass(frozen=True)
class OneStepRule:
    """How a student is called, as network(x_t, timestep) with x_t = input_scale * noise, and how its prediction becomes a clean latent."""

    prediction: Prediction
    timestep: float
    """What the network is fed."""
    alpha: float
    """The noise schedule's value that reads the prediction. It may belong to another timestep than the one that is fed (a trap of public
    checkpoints)."""
    sigma: float
    """The same of the noise."""
    input_scale: float = 1.0
    """1 (raw noise) or, for Euler students, sigma: Euler calls with x / sqrt(s^2 + 1), x = s * noise and s = sigma / alpha, which is
    sigma * noise."""
    later: tuple["OneStepRule", ...] = ()
    """The further steps of a student of 2 to 8 steps, each starting from alpha * x0 + kept * predicted noise + fresh * new noise."""
    kept: float = 0.0
    """How much of a later step's noise is what the step before predicted: 0, all of it is new (LCM, DMD2), up to sigma (Euler, DDIM)."""
    end: tuple[float, float] = (1.0, 0.0)
    """alpha and sigma at which the last step ends: DEIS and TCD stop at their first timestep, and leave 0.03 of the predicted noise."""

    @property
    def steps(self) -> tuple["OneStepRule", ...]:
        """All steps in the order of the calls, this one first."""
        return (self, *self.later)

    @property
    def fresh(self) -> float:
        """How much new noise a later step's input has."""
        if not self.kept:
            return self.sigma
        return 0.0 if math.isclose(self.kept, self.sigma, rel_tol=1e-4) else math.sqrt(self.sigma**2 - self.kept**2)

    @property
    def renoises(self) -> int:
        """How many noises `run` reads beside the first: one for each later step, none if all of these keep the predicted noise."""
        return len(self.later) if any(step.fresh for step in self.later) else 0

    @property
    def error_gain(self) -> float:
        """How much an error in the prediction of this step grows in the clean latent."""
        match self.prediction:
            case "epsilon":
                return self.sigma / self.alpha
            case "v" | "velocity" | "reversed_velocity":
                return self.sigma
            case _:
                return 1.0

    def x0(self, x_t: "Tensor", prediction: "Tensor") -> "Tensor":
        """The clean latent (B, C, h, w) of this step, always in fp32: epsilon errors grow by sigma / alpha here, 157 for PixArt at t = 999.

        x_t: what the network was called with.
        """
        return clean_latent(self.prediction, x_t.float(), prediction.float(), self.alpha, self.sigma)

    def run(self, network: "Callable[[int, Tensor], Tensor]", noise: "Tensor", renoise: "Tensor | None" = None) -> "Tensor":
        """The latent (B, C, h, w) in fp32 after all S steps; network(i, x_t) is the student's prediction at steps[i].timestep.

        noise (B, C, h, w); renoise (B, S - 1, C, h, w), read if `renoises` is not 0 (DMD2, section 4.4; multistep sampling of
        consistency models). diffusers' LCMScheduler also mixes c_skip = 0.25 / ((10 t)^2 + 0.25) of x_t into x0, 3e-9 at t = 999 and 4e-8
        at t = 249, which is left out here.
        """
        x_t = self.input_scale * noise
        ends = [*((step.alpha, step.kept, step.fresh) for step in self.later), (*self.end, 0.0)]
        for i, (step, (alpha, kept, fresh)) in enumerate(zip(self.steps, ends, strict=True)):
            x_t = step._onward(x_t, step.x0(x_t, network(i, x_t)), alpha, kept)
            if fresh:
                assert renoise is not None, "a student whose steps take new noise reads renoise"
                x_t = x_t + fresh * renoise[:, i]
        return x_t

    def _onward(self, x_t: "Tensor", x0: "Tensor", alpha: float, kept: float) -> "Tensor":
        """alpha * x0 + kept * the noise that this step predicted, which is (x_t - self.alpha * x0) / self.sigma."""
        if not kept:
            return x0 if alpha == 1 else alpha * x0
        share = kept / self.sigma
        return (alpha - share * self.alpha) * x0 + share * x_t.float()


def clean_latent(
    prediction_type: Prediction, x_t: "Tensor", prediction: "Tensor", alpha: "Tensor | float", sigma: "Tensor | float"
) -> "Tensor":
    """The x0 that a network's prediction for x_t = alpha * x0 + sigma * eps implies, all (B, C, h, w); alpha and sigma may
    be one per sample.

    velocity: the prediction is noise - x0, at alpha = 1 - sigma (a flow in a straight line). reversed_velocity: it is x0 - noise.
    """
    match prediction_type:
        case "epsilon":
            return (x_t - sigma * prediction) / alpha
        case "v":
            return alpha * x_t - sigma * prediction
        case "x0":
            return prediction
        case "velocity":
            return x_t - sigma * prediction
        case "reversed_velocity":
            return x_t + sigma * prediction


def trigflow_rule(angles: Sequence[float]) -> OneStepRule:
    """The rule of a student that is called at those timesteps of SCMScheduler, angles t in radians (SANA-Sprint, arXiv 2503.09641).

    With s = sin t / (cos t + sin t) the network is fed s and x_s = (1 - s) x0 + s * noise, in units of the data's deviation, and what the
    pipeline makes of its output m comes to x0 = x_s - s m: m is a velocity. It starts from pure noise times |(s, 1 - s)|.
    """
    shares = [math.sin(angle) / (math.cos(angle) + math.sin(angle)) for angle in angles]
    first, *later = (OneStepRule("velocity", share, 1 - share, share) for share in shares)
    return replace(first, input_scale=math.hypot(shares[0], 1 - shares[0]), later=tuple(later))


def linear_schedule(start: float, end: float, steps: int = 1000) -> np.ndarray:
    """alphas_cumprod (steps,) in float64 of betas that grow linearly (DDPM)."""
    return np.cumprod(1 - np.linspace(start, end, steps))


def scaled_linear_schedule(start: float, end: float, steps: int = 1000) -> np.ndarray:
    """alphas_cumprod (steps,) in float64 of betas whose square roots grow linearly (latent diffusion)."""
    return np.cumprod(1 - np.linspace(math.sqrt(start), math.sqrt(end), steps) ** 2)


SCHEDULES = {"sd": scaled_linear_schedule(0.00085, 0.012), "pixart": linear_schedule(0.0001, 0.02)}
"""alphas_cumprod of the two families: SD 1.5, SD 2.1 and SDXL; PixArt alpha and sigma."""
