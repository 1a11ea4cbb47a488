"""The prompts and noises that variants are calibrated on, and the others that their parity is evaluated on."""

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
EVALUATION = (
    "a dog wearing a blue scarf",
    "a 3d render of a rocket in the night sky",
    "black and white photo of a lighthouse in a storm, long exposure, dramatic clouds, high contrast",
    "a bicycle",
)
NEGATIVES = ("blurry", "low quality, deformed, watermark", "a person", "grayscale, grainy photo")
TEXTS = ("", *CALIBRATION, *EVALUATION, *NEGATIVES)
SCALES = (0.0, 0.25, 0.5, 1.0)
"""Shares of the guidance's largest scale: weak and strong ones occur with every prompt."""


@dataclass(frozen=True)
class GeneratorSamples:
    """Inputs of the graph `generator`, by name."""

    calibration: list[dict[str, Tensor]]
    """Of batch 1 each."""
    evaluation: list[dict[str, Tensor]]
    """Of batch 1 each; of other prompts than those for calibration."""
    example: dict[str, Tensor]
    """Of batch 2, for the ONNX exporter."""


def generator_samples(
    states: Mapping[str, Mapping[str, Tensor]], guidance: Guidance, latent: tuple[int, int, int], renoises: int, masks: bool
) -> GeneratorSamples:
    """Samples over the text encoder's outputs for TEXTS (`states`, by prompt) with `renoises` further noises; `latent` is (C, h, w)."""
    random = torch.Generator().manual_seed(0)

    def sample(number: int, prompt: str) -> dict[str, Tensor]:
        inputs = {"noise": torch.randn(1, *latent, generator=random), "prompt_states": states[prompt]["states"]}
        if renoises:
            inputs["renoise"] = torch.randn(1, renoises, *latent, generator=random)
        if masks:
            inputs["prompt_mask"] = _all_tokens(inputs["prompt_states"])
        if guidance.attend is not None:
            negative = states[NEGATIVES[number % len(NEGATIVES)]]["states"]
            inputs["negative_states"] = negative
            if masks:
                inputs["negative_mask"] = _all_tokens(negative)
            # Out of step with the negatives: every pair occurs.
            inputs["negative_scale"] = torch.tensor([guidance.max_scale * SCALES[(number // len(NEGATIVES) + number) % len(SCALES)]])
        if "pooled" in states[prompt]:
            inputs["prompt_pooled"] = states[prompt]["pooled"]
        return inputs

    def samples(prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        return [sample(number, prompt) for number, prompt in enumerate(prompts)]

    calibration, evaluation = samples(CALIBRATION), samples(EVALUATION)
    return GeneratorSamples(calibration, evaluation, {name: torch.cat([value, value]) for name, value in evaluation[1].items()})


def _all_tokens(states: Tensor) -> Tensor:
    return torch.ones(states.shape[:2], dtype=torch.bool)
