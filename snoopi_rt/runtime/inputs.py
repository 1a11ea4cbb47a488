"""The generator's inputs, in batches, from requests, the states of their prompts and their seeds. Knows no engine."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from snoopi_rt.bundle.bundle import Latent
from snoopi_rt.engines.base import TensorSpec
from snoopi_rt.errors import BundleError
from snoopi_rt.request import Request
from snoopi_rt.runtime.shape_ranges import TOKENS

States = dict[str, np.ndarray]
"""What the text encoder makes of one prompt, by output name: states (1, T, D) float32 and the like."""


def in_batches(
    requests: Sequence[Request], states: Mapping[str, States], inputs: Sequence[TensorSpec], max_batch: int
) -> Iterator[list[Request]]:
    """The requests in order, in batches of at most `max_batch`; a graph without masks gets only prompts of equal length in a batch."""
    names = {spec.name for spec in inputs}

    def lengths(request: Request) -> tuple[int, int]:
        prompt, negative = _states(request, states)
        return (0 if "prompt_mask" in names else prompt.shape[1]), (0 if "negative_mask" in names else negative.shape[1])

    for _, group in groupby(requests, lengths):
        batch = list(group)
        for start in range(0, len(batch), max_batch):
            yield batch[start : start + max_batch]


def generator_inputs(
    batch: Sequence[Request],
    states: Mapping[str, States],
    inputs: Sequence[TensorSpec],
    latent: Latent,
    size: tuple[int, int],
    longest: int | None = None,
) -> dict[str, np.ndarray]:
    """The arrays of the inputs that the generator lists, by name. Raises BundleError for an unknown input.

    `longest`: the largest number of tokens of a prompt, for engines that prefer fixed shapes: masked prompts are padded to a multiple of
    TOKENS.
    """
    prompts, negatives = zip(*(_states(request, states) for request in batch), strict=True)
    shapes = {spec.name: spec.shape for spec in inputs}
    prompt_states, prompt_mask = _padded(prompts, longest if "prompt_mask" in shapes else None)
    negative_states, negative_mask = _padded(negatives, longest if "negative_mask" in shapes else None)
    shape = (latent.channels, size[0] // latent.factor, size[1] // latent.factor)
    steps = shapes["renoise"][1] or 0 if "renoise" in shapes else 0
    noise, renoise = zip(*(draw_noise(request.seed, shape, steps) for request in batch), strict=True)
    arrays: dict[str, Any] = {
        "noise": np.stack(noise),
        "renoise": np.stack(renoise),
        "prompt_states": prompt_states,
        "prompt_mask": prompt_mask,
        "negative_states": negative_states,
        "negative_mask": negative_mask,
        "negative_scale": np.array([0.0 if request.negative_scale is None else request.negative_scale for request in batch], np.float32),
    }
    if "prompt_pooled" in shapes:
        arrays["prompt_pooled"] = np.concatenate([states[request.prompt]["pooled"] for request in batch])
    if unknown := shapes.keys() - arrays.keys():
        raise BundleError(f"the generator takes {min(unknown)!r}, which this snoopi-rt does not provide")
    return {name: arrays[name] for name in shapes}


def draw_noise(seed: int, shape: tuple[int, ...], steps: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The noise of one image and that of its `steps` later steps, float32 `shape` and (steps, *shape).

    RandomState is the only generator whose stream numpy guarantees never to change.
    """
    stream = np.random.RandomState(seed)
    return stream.standard_normal(shape).astype(np.float32), stream.standard_normal((steps, *shape)).astype(np.float32)


def _states(request: Request, states: Mapping[str, States]) -> tuple[np.ndarray, np.ndarray]:
    """The states of the prompt and of the negative prompt; without one it is one zero token, which has no effect at scale 0."""
    prompt = states[request.prompt]["states"]
    negative = np.zeros_like(prompt[:, :1]) if request.negative_prompt is None else states[request.negative_prompt]["states"]
    return prompt, negative


def _padded(states: Sequence[np.ndarray], longest: int | None) -> tuple[np.ndarray, np.ndarray]:
    """States (1, T, D) each, stacked to (B, max T, D) with zeros as padding, and the mask of real tokens (B, max T)."""
    tokens = max(state.shape[1] for state in states)
    if longest is not None:
        tokens = min(-(-tokens // TOKENS) * TOKENS, longest)
    padded = np.zeros((len(states), tokens, states[0].shape[2]), np.float32)
    mask = np.zeros((len(states), tokens), bool)
    for row, state in enumerate(states):
        padded[row, : state.shape[1]] = state[0]
        mask[row, : state.shape[1]] = True
    return padded, mask
