"""All that is random in a step of PG-SB: of each sample by its own number, so that it is the same on one process and on many."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from snoopi_rt.export.training.loop import generator
from snoopi_rt.export.training.recipe import Recipe

LAST = 1000  # timesteps


@dataclass(frozen=True)
class Draws:
    """Of the student's step. noise and eps (B, C, h, w); t (B,); kappa, nasa: (B,) from U(0, 1); negative: (B,) numbers of negatives."""

    noise: Tensor
    eps: Tensor
    t: Tensor
    kappa: Tensor
    nasa: Tensor
    negative: list[int]


@dataclass(frozen=True)
class LoraDraws:
    """Of one of the LoRA teacher's steps. eps (B, C, h, w); t (B,); empty (B,): whose prompt is left out."""

    eps: Tensor
    t: Tensor
    empty: list[bool]


def draw(recipe: Recipe, step: int, samples: Iterable[int], shape: tuple[int, ...], negatives: int, device: torch.device) -> Draws:
    """The draws of some samples (numbers in the step's batch)."""
    # One for the whole batch, on every process the same.
    shared = torch.rand((), generator=generator(recipe.seed, step, "kappa"))
    rows = []
    for sample in samples:
        random = generator(recipe.seed, step, sample)
        noise, eps = torch.randn(2, *shape, generator=random)
        t = torch.randint(recipe.t_min, recipe.t_max + 1, (), generator=random)
        kappa, nasa = torch.rand(2, generator=random)
        negative = torch.randint(max(negatives, 1), (), generator=random)
        rows.append((noise, eps, t, shared if recipe.kappa_per == "batch" else kappa, nasa, negative))
    noise, eps, t, kappa, nasa, negative = (torch.stack(column) for column in zip(*rows, strict=True))
    return Draws(noise.to(device), eps.to(device), t.to(device), kappa.to(device), nasa.to(device), negative.tolist())


def draw_lora(recipe: Recipe, step: int, turn: int, samples: Iterable[int], shape: tuple[int, ...], device: torch.device) -> LoraDraws:
    """The draws of some samples for turn number `turn` of the LoRA teacher in this step."""
    rows = []
    for sample in samples:
        random = generator(recipe.seed, step, sample, "lora", turn)
        rows.append(
            (
                torch.randn(*shape, generator=random),
                torch.randint(LAST, (), generator=random),
                torch.rand((), generator=random) < recipe.empty,
            )
        )
    eps, t, empty = (torch.stack(column) for column in zip(*rows, strict=True))
    return LoraDraws(eps.to(device), t.to(device), empty.tolist())


def pair_noise(recipe: Recipe, pairs: Iterable[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The noise (B, C, h, w) of the pairs that a warm start is trained on, by their numbers."""
    return torch.stack([torch.randn(*shape, generator=generator(recipe.seed, "pair", pair)) for pair in pairs]).to(device)
