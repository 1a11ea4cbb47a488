"""A noise schedule and what a network predicts under it: every kind of answer brought to one form, the clean latent."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from snoopi_rt.errors import InputError
from snoopi_rt.export.one_step import OneStepRule, Prediction
from snoopi_rt.export.presets.scheduler_check import DIFFUSERS_PREDICTION, open_scheduler


@dataclass(frozen=True)
class Schedule:
    """x_t = alpha_t x0 + sigma_t eps with alpha_t^2 = alphas_cumprod[t], (T,) fp32; `prediction`: epsilon, v or x0.

    Tensors are (B, C, h, w), timesteps (B,) int64, and all arithmetic is fp32: an epsilon's error grows by sigma / alpha in x0.
    """

    alphas_cumprod: Tensor
    prediction: Prediction

    @classmethod
    def of(cls, folder: Path) -> "Schedule":
        """The schedule of a diffusers folder's scheduler/. Raises InputError where there is none, or one of a flow."""
        scheduler = open_scheduler(folder / "scheduler" / "scheduler_config.json")
        prediction = DIFFUSERS_PREDICTION.get(scheduler.config.get("prediction_type", "epsilon"))
        if prediction not in ("epsilon", "v", "x0") or getattr(scheduler, "alphas_cumprod", None) is None:
            raise InputError(f"the scheduler in {folder} is {type(scheduler).__name__}: PG-SB needs a teacher of kind epsilon, v or x0")
        return cls(scheduler.alphas_cumprod.float(), prediction)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma (B, 1, 1, 1)."""
        cumprod = self.alphas_cumprod.to(t.device)[t].view(-1, 1, 1, 1)
        return cumprod.sqrt(), (1 - cumprod).sqrt()

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * eps

    def x0(self, x_t: Tensor, answer: Tensor, t: Tensor) -> Tensor:
        """The clean latent that the answer means."""
        alpha, sigma = self.alpha_sigma(t)
        match self.prediction:
            case "epsilon":
                return (x_t - sigma * answer) / alpha
            case "v":
                return alpha * x_t - sigma * answer
            case _:
                return answer

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The answer that is right for x_t."""
        alpha, sigma = self.alpha_sigma(t)
        return {"epsilon": eps, "v": alpha * eps - sigma * x0, "x0": x0}[self.prediction]

    def rule(self, timestep: int) -> OneStepRule:
        """How a student with the teacher's kind of answer is called and read at one timestep."""
        alpha, sigma = (float(value) for value in self.alpha_sigma(torch.tensor([timestep])))
        if alpha == 0 and self.prediction == "epsilon":
            raise InputError(f"at timestep {timestep} there is no signal, and epsilon says nothing of x0: feed an earlier timestep")
        return OneStepRule(self.prediction, float(timestep), alpha, sigma)
