"""PG-SB's losses: variational score distillation with a random guidance scale. Pure functions of tensors: no network, no loop.

Notation of SNOOPI (arXiv 2412.02687): x_t = alpha x0 + sigma eps; kappa is the guidance scale, 1 is no guidance; the frozen teacher is
psi, the LoRA teacher pi. Shapes are (B, C, H, W), one scalar per sample is (B, 1, 1, 1).
"""

import torch
from torch import Tensor

from snoopi_rt.export.training.recipe import RandomOn, Weighting


def guided(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """(1 - kappa) unconditional + kappa conditional (v3, equation 4): classifier-free guidance, for epsilon, v and x0 alike."""
    return unconditional + scale * (conditional - unconditional)


def guidance_scales(uniform: Tensor, low: float, high: float, random_on: RandomOn, lora: float = 0.0) -> tuple[Tensor, Tensor]:
    """The guidance scales of the frozen and of the LoRA teacher, (B, 1, 1, 1) each, for numbers (B,) from U(0, 1).

    Both teachers share one scale from U(low, high); a teacher on which it is not random takes the mean (v1, table 2). `lora`: above 0, a
    fixed scale of the LoRA teacher.
    """
    random = (low + (high - low) * uniform).view(-1, 1, 1, 1)
    mean = torch.full_like(random, (low + high) / 2)
    own = torch.full_like(random, lora) if lora else random if random_on in ("both", "lora") else mean
    return (random if random_on in ("both", "frozen") else mean), own


def vsd_gradient(x0: Tensor, teacher_x0: Tensor, lora_x0: Tensor, alpha: Tensor, sigma: Tensor, weighting: Weighting) -> Tensor:
    """The gradient of VSD with respect to x0: w(t) (eps_teacher - eps_lora), written in x0 (v3, equation 6).

    eps_teacher - eps_lora = alpha / sigma (lora_x0 - teacher_x0). What `weighting` makes of it:
    epsilon: w = 1. swiftbrush: w = sigma^2, as in SwiftBrush's code. x0: w = sigma / alpha, the plain difference of the clean latents.
    dmd: that difference over mean |x0 - teacher_x0| per sample (Yin et al. 2023, equation 8), so that every timestep counts alike.
    """
    difference = lora_x0 - teacher_x0
    match weighting:
        case "epsilon":
            return alpha / sigma * difference
        case "swiftbrush":
            return alpha * sigma * difference
        case "x0":
            return difference
        case "dmd":
            return difference / (x0 - teacher_x0).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)


def vsd_loss(x0: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose derivative with respect to x0 is gradient / B / C / H / W (SwiftBrush's form)."""
    return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()


def lora_loss(prediction: Tensor, target: Tensor, alpha: Tensor, weighted: bool) -> Tensor:
    """The LoRA teacher's denoising loss; `weighted` by alpha^2, as in SwiftBrush's code, else as in the paper."""
    error = prediction - target
    return (alpha * error if weighted else error).square().mean()


def clamped_clip_loss(similarity: Tensor, threshold: float) -> Tensor:
    """max(0, threshold - cosine) of picture and prompt (B,), averaged (SwiftBrush v2, equation 5): no pull beyond the threshold."""
    return (threshold - similarity).clamp(min=0).mean()
