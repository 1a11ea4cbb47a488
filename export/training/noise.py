"""All randomness of a step of PG-SB. Every sample has random streams of its own, so that one process and many draw the same."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from snoopi_rt.export.training.loop import random_stream
from snoopi_rt.export.training.recipe import StudentRecipe

TIMESTEPS = 1000
# The names of random streams ("kappa", "lora", "pair") are part of every run: another name would be other noise.


@dataclass(frozen=True)
class StudentNoise:
    """The random numbers of the student's step for B samples."""

    noise: Tensor
    """What the student draws from, (B, C, h, w)."""
    eps: Tensor
    """What its pictures are noised with before the teachers see them, (B, C, h, w)."""
    t: Tensor
    """The timesteps to which they are noised, (B,) int64."""
    guidance: Tensor
    """The guidance scale's place between its bounds, (B,) from U(0, 1)."""
    negative_scale: Tensor
    """The negative scale as a share of the largest, (B,) from U(0, 1)."""
    negatives: list[int]
    """The row of each sample's negative prompt."""


@dataclass(frozen=True)
class LoraNoise:
    """The random numbers of one of the LoRA teacher's steps for B samples."""

    eps: Tensor
    """What the student's pictures are noised with, (B, C, h, w)."""
    t: Tensor
    """The timesteps to which they are noised, (B,) int64."""
    dropped: list[bool]
    """Whose prompt is replaced by the empty one."""


def student_noise(
    recipe: StudentRecipe, step: int, samples: Iterable[int], shape: tuple[int, ...], negatives: int, device: torch.device
) -> StudentNoise:
    """The random numbers of some samples, by their numbers in the step's batch, out of so many negative prompts."""
    # One for the whole batch, on every process the same.
    shared = torch.rand((), generator=random_stream(recipe.seed, step, "kappa"))
    rows = []
    for sample in samples:
        random = random_stream(recipe.seed, step, sample)
        noise, eps = torch.randn(2, *shape, generator=random)
        t = torch.randint(recipe.t_min, recipe.t_max + 1, (), generator=random)
        own, negative_scale = torch.rand(2, generator=random)
        negative = torch.randint(max(negatives, 1), (), generator=random)
        rows.append((noise, eps, t, shared if recipe.guidance.per == "batch" else own, negative_scale, negative))
    noise, eps, t, guidance, negative_scale, negative = (torch.stack(column) for column in zip(*rows, strict=True))
    return StudentNoise(noise.to(device), eps.to(device), t.to(device), guidance.to(device), negative_scale.to(device), negative.tolist())


def lora_noise(
    recipe: StudentRecipe, step: int, turn: int, samples: Iterable[int], shape: tuple[int, ...], device: torch.device
) -> LoraNoise:
    """The random numbers of some samples in one of the LoRA teacher's turns in this step."""
    rows = []
    for sample in samples:
        random = random_stream(recipe.seed, step, sample, "lora", turn)
        rows.append(
            (
                torch.randn(*shape, generator=random),
                torch.randint(TIMESTEPS, (), generator=random),
                torch.rand((), generator=random) < recipe.lora.prompt_dropout,
            )
        )
    eps, t, dropped = (torch.stack(column) for column in zip(*rows, strict=True))
    return LoraNoise(eps.to(device), t.to(device), dropped.tolist())


def pair_noise(recipe: StudentRecipe, pairs: Iterable[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The noise (B, C, h, w) of pairs of noise and prompt, by their numbers."""
    return torch.stack([torch.randn(*shape, generator=random_stream(recipe.seed, "pair", pair)) for pair in pairs]).to(device)
