"""Clean latents from noise by a teacher in several steps (DDIM with classifier-free guidance)."""

from collections.abc import Callable

import torch
from torch import Tensor

from snoopi_rt.export.training.pgsb import guided
from snoopi_rt.export.training.schedule import Schedule


@torch.no_grad()
def ddim(
    schedule: Schedule,
    answers: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    noise: Tensor,
    calls: int,
    scale: float,
) -> Tensor:
    """Clean latents (B, C, h, w) fp32 in `calls` steps from pure noise at the last timestep, evenly spaced (diffusers' "trailing").

    answers(x_t, t): the conditional and the empty prompt's answer. `scale`: of guidance, 1 is none.
    """
    left, x_t = len(schedule.alphas_cumprod), noise
    steps = [round(left - i * left / calls) - 1 for i in range(calls)]
    for now, following in zip(steps, [*steps[1:], None], strict=True):
        t = torch.full((len(noise),), now, device=noise.device)
        conditional, empty = answers(x_t, t)
        x0 = schedule.x0(x_t, guided(conditional, empty, torch.as_tensor(scale)), t)
        if following is not None:
            alpha, sigma = schedule.alpha_sigma(t)
            x_t = schedule.noised(x0, (x_t - alpha * x0) / sigma, torch.full_like(t, following))
    return x0
