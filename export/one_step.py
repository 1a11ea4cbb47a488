"""From a network's one answer to a clean latent."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class OneStepRule:
    """How a one-step student is called and read.

    `alpha` and `sigma` read the answer and may belong to another timestep than the one that is fed (a trap of public checkpoints).
    """

    prediction: Literal["epsilon", "v", "x0", "flow"]
    timestep: float
    alpha: float
    sigma: float
    input_scale: float = 1.0

    def x0(self, noise: Tensor, answer: Tensor) -> Tensor:
        """The clean latent (B, C, h, w), always in fp32: epsilon errors grow by sigma / alpha here, 157 for PixArt at t = 999."""
        noise, answer = noise.float(), answer.float()
        match self.prediction:
            case "epsilon":
                return (noise - self.sigma * answer) / self.alpha
            case "v":
                return self.alpha * noise - self.sigma * answer
            case "x0":
                return answer
            case "flow":
                return noise + answer
