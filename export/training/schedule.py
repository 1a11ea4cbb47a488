"""A noise schedule, and what a network predicts under it brought to one form, the clean latent."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snoopi_rt.errors import InputError
from snoopi_rt.export.one_step import OneStepRule, Prediction, clean_latent
from snoopi_rt.export.presets.scheduler import DIFFUSERS_PREDICTION, open_scheduler


@dataclass(frozen=True)
class Schedule:
    """x_t = alpha_t x0 + sigma_t eps with alpha_t^2 = alphas_cumprod[t], (T,) fp32.

    Tensors are (B, C, h, w), timesteps (B,) int64. All arithmetic is fp32: the error of a predicted epsilon grows by sigma / alpha in x0.
    """

    alphas_cumprod: Tensor
    prediction: Prediction

    @classmethod
    def of(cls, folder: Path) -> "Schedule":
        """The schedule in the scheduler/ of a diffusers folder. Raises InputError if there is none, and for one of a flow."""
        return cls.from_scheduler(open_scheduler(folder / "scheduler" / "scheduler_config.json"), f" in {folder}")

    @classmethod
    def from_scheduler(cls, scheduler: Any, where: str = "") -> "Schedule":
        """The schedule of a diffusers scheduler. Raises InputError for one of a flow."""
        prediction = DIFFUSERS_PREDICTION.get(scheduler.config.get("prediction_type", "epsilon"))
        if prediction not in ("epsilon", "v", "x0") or getattr(scheduler, "alphas_cumprod", None) is None:
            raise InputError(f"the scheduler{where} is {type(scheduler).__name__}: the teacher must predict epsilon, v or x0")
        return cls(scheduler.alphas_cumprod.float(), prediction)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t, (B, 1, 1, 1) each."""
        cumprod = self.alphas_cumprod.to(t.device)[t].view(-1, 1, 1, 1)
        return cumprod.sqrt(), (1 - cumprod).sqrt()

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t: the clean latent noised to t."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * eps

    def x0(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean latent that a prediction for x_t implies."""
        return clean_latent(self.prediction, x_t, prediction, *self.alpha_sigma(t))

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should predict for x_t."""
        alpha, sigma = self.alpha_sigma(t)
        return {"epsilon": eps, "v": alpha * eps - sigma * x0, "x0": x0}[self.prediction]

    def rule(self, timestep: int) -> OneStepRule:
        """How a student with the teacher's kind of prediction is called and read at one timestep. Raises InputError for one without signal
        if the network predicts epsilon."""
        alpha, sigma = (float(value) for value in self.alpha_sigma(torch.tensor([timestep])))
        if alpha == 0 and self.prediction == "epsilon":
            raise InputError(f"at timestep {timestep} there is no signal, so that epsilon says nothing about x0: feed an earlier timestep")
        return OneStepRule(self.prediction, float(timestep), alpha, sigma)
