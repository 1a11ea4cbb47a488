"""PG-SB's losses: variational score distillation with a random guidance scale. Pure functions of tensors: no network, no loop.

Notation of SNOOPI (arXiv 2412.02687): x_t = alpha x0 + sigma eps; kappa is the guidance scale, 1 is no guidance; the frozen teacher is
psi, the LoRA teacher pi. Shapes are (B, C, H, W), scalars a sample (B, 1, 1, 1).
"""

import torch
from torch import Tensor


def guided(conditional: Tensor, empty: Tensor, kappa: Tensor) -> Tensor:
    """(1 - kappa) empty + kappa conditional (v3, equation 4). Linear, so it holds for epsilon, v and x0 alike."""
    return empty + kappa * (conditional - empty)


def random_kappa(batch: int, low: float, high: float, random: torch.Generator) -> Tensor:
    """One guidance scale a sample, U(low, high), shape (B, 1, 1, 1); both teachers use the same draw."""
    return low + (high - low) * torch.rand(batch, 1, 1, 1, generator=random)


def x0_from_v(x_t: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean latent that a v-prediction means: alpha x_t - sigma v."""
    return alpha * x_t - sigma * v


def vsd_gradient(x0: Tensor, teacher_x0: Tensor, lora_x0: Tensor) -> Tensor:
    """The gradient of VSD with respect to x0: w(t) (eps_teacher - eps_lora), written in x0.

    eps_teacher - eps_lora = alpha / sigma (lora_x0 - teacher_x0); w(t) is DMD's choice (Yin et al. 2023, equation 8), which makes
    every timestep weigh alike: 1 / mean |x0 - teacher_x0| a sample.
    """
    scale = (x0 - teacher_x0).abs().mean((1, 2, 3), keepdim=True)
    return (lora_x0 - teacher_x0) / scale.clamp(min=1e-6)


def vsd_loss(x0: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose derivative with respect to x0 is gradient / B / C / H / W (SwiftBrush's form)."""
    return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()


def v_target(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the LoRA teacher learns to say of x_t: alpha eps - sigma x0."""
    return alpha * eps - sigma * x0
