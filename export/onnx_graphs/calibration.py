"""The prompts and noises that variants are calibrated on, and the others that they are measured on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snoopi_rt.export.guidance import Guidance

CALIBRATION = (
    "a cat",
    "portrait of an old fisherman, weathered face, soft window light",
    "a red apple on a blue background",
    "an astronaut riding a horse on mars, cinematic lighting, highly detailed",
    "watercolor painting of a small village by the sea at dawn",
    "a bowl of ramen with an egg and green onions, seen from above",
    "macro photo of a dew drop on a leaf",
    "a futuristic city at night, neon signs, rain, reflections on the street",
    "low poly fox in a snowy forest",
    "an oil painting of sunflowers in a vase",
    "a steam train crossing a stone bridge in the mountains",
    "logo of a coffee shop, flat, minimal",
    "three golden retriever puppies in a basket",
    "the interior of a library with tall windows and a spiral staircase, volumetric light, 8k",
    "a cup of tea",
    "a knight in shining armour standing before a dragon, fantasy art",
)
SCORED = (
    "a dog wearing a blue scarf",
    "a 3d render of a rocket in the night sky",
    "black and white photo of a lighthouse in a storm, long exposure, dramatic clouds, high contrast",
    "a bicycle",
)
NEGATIVES = ("blurry", "low quality, deformed, watermark", "a person", "grayscale, grainy photo")
TEXTS = ("", *CALIBRATION, *SCORED, *NEGATIVES)
SCALES = (0.0, 0.25, 0.5, 1.0)
"""Of the guidance's largest scale: weak and strong ones occur with every prompt."""


@dataclass(frozen=True)
class Cases:
    """Inputs of the generator, batch 1 each, and an example of batch 2 for the exporter."""

    calibration: list[dict[str, Tensor]]
    scored: list[dict[str, Tensor]]
    example: dict[str, Tensor]


def generator_cases(
    states: Mapping[str, Mapping[str, Tensor]], guidance: Guidance, latent: tuple[int, int, int], steps: int, masks: bool
) -> Cases:
    """Cases over the states of TEXTS for a student of `steps` steps; `latent` is (C, h, w)."""
    random = torch.Generator().manual_seed(0)

    def case(number: int, prompt: str) -> dict[str, Tensor]:
        given = {"noise": torch.randn(1, *latent, generator=random), "prompt_states": states[prompt]["states"]}
        if steps > 1:
            given["renoise"] = torch.randn(1, steps - 1, *latent, generator=random)
        if masks:
            given["prompt_mask"] = _all_tokens(given["prompt_states"])
        if guidance.attend is not None:
            other = states[NEGATIVES[number % len(NEGATIVES)]]["states"]
            given["negative_states"] = other
            if masks:
                given["negative_mask"] = _all_tokens(other)
            # Out of step with the negatives: every pair occurs.
            given["negative_scale"] = torch.tensor([guidance.max_scale * SCALES[(number // len(NEGATIVES) + number) % len(SCALES)]])
        if "pooled" in states[prompt]:
            given["prompt_pooled"] = states[prompt]["pooled"]
        return given

    def cases(prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        return [case(number, prompt) for number, prompt in enumerate(prompts)]

    calibration, scored = cases(CALIBRATION), cases(SCORED)
    return Cases(calibration, scored, {name: torch.cat([value, value]) for name, value in scored[1].items()})


def _all_tokens(states: Tensor) -> Tensor:
    return torch.ones(states.shape[:2], dtype=torch.bool)
