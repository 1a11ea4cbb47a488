"""Clean latents from noise by a teacher in several steps: DDIM with classifier-free guidance."""

from collections.abc import Callable

import torch
from torch import Tensor

from snoopi_rt.export.training.pgsb import guided
from snoopi_rt.export.training.schedule import Schedule


@torch.no_grad()
def sample_ddim(
    schedule: Schedule,
    predict: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    noise: Tensor,
    steps: int,
    guidance_scale: float,
) -> Tensor:
    """Clean latents (B, C, h, w) fp32 in so many steps from pure noise at the last timestep, evenly spaced (diffusers' "trailing").

    predict(x_t, t): the conditional and the unconditional prediction. guidance_scale: 1 is no guidance.
    """
    last, x_t = len(schedule.alphas_cumprod), noise
    timesteps = [round(last - i * last / steps) - 1 for i in range(steps)]
    for now, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        t = torch.full((len(noise),), now, device=noise.device)
        conditional, unconditional = predict(x_t, t)
        x0 = schedule.x0(x_t, guided(conditional, unconditional, torch.as_tensor(guidance_scale)), t)
        if following is not None:
            alpha, sigma = schedule.alpha_sigma(t)
            x_t = schedule.noised(x0, (x_t - alpha * x0) / sigma, torch.full_like(t, following))
    return x0
