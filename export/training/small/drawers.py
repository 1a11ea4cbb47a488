"""Who draws the pictures that are judged: a bundle in one call, or a teacher in many."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, PixArtTransformer2DModel
from tqdm import tqdm

import snoopi_rt
from snoopi_rt.export.attention import PlainAttention
from snoopi_rt.export.backbones import Weights
from snoopi_rt.export.backbones.network import load_decoder
from snoopi_rt.export.backbones.pixart import pixart_answer
from snoopi_rt.export.presets.rows import default_preset
from snoopi_rt.export.text.minilm import encode
from snoopi_rt.export.training.sampling import ddim
from snoopi_rt.export.training.schedule import Schedule
from snoopi_rt.export.training.small.autoencoder import to_network, to_pictures
from snoopi_rt.export.training.small.evaluate import Drawer
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.feeds import draw_noise

TOGETHER = 16
"""Images of one call of a bundle."""


def bundle_drawer(pipe: snoopi_rt.Pipeline) -> Drawer:
    """Draws with a bundle."""

    def draw(prompts: Sequence[str], seeds: Sequence[int], negative: str | None = None, scale: float | None = None) -> np.ndarray:
        found = []
        for start in tqdm(range(0, len(prompts), TOGETHER), desc=negative or "no negative", unit="batch", leave=False):
            part = slice(start, start + TOGETHER)
            strength = None if negative is None else scale
            found.append(pipe.generate(list(prompts[part]), negative, strength, list(seeds[part])).images)
        return np.concatenate(found)

    return draw


def teacher_drawer(folder: Path, guidance: float, steps: int) -> Drawer:
    """Draws with a teacher by DDIM, from the noise that a bundle would start from. It takes no negative here."""
    network = load_module(folder / "transformer", PixArtTransformer2DModel, dtype=torch.bfloat16)
    network.set_attn_processor(PlainAttention())
    decoder, schedule = load_decoder(Weights(folder), default_preset("small")), Schedule.of(folder)
    shape = (network.config.in_channels, *[network.config.sample_size] * 2)

    @torch.no_grad()
    def draw(prompts: Sequence[str], seeds: Sequence[int], negative: str | None = None, scale: float | None = None) -> np.ndarray:
        states, lengths = encode(["", *prompts])
        mask, found = torch.arange(states.shape[1]) < lengths[:, None], []
        for start in tqdm(range(0, len(prompts), TOGETHER), desc=f"teacher, guidance {guidance:g}", unit="batch", leave=False):
            rows = torch.arange(start, min(start + TOGETHER, len(prompts))) + 1
            both = torch.cat([rows, torch.zeros_like(rows)])
            text, tokens = states[both].bfloat16(), mask[both]

            def answers(x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor = text, tokens: torch.Tensor = tokens) -> tuple:
                twice = torch.cat([x_t, x_t]).bfloat16()
                return pixart_answer(network, twice, torch.cat([t, t]), text, tokens, None).float().chunk(2)

            noise = torch.from_numpy(np.stack([draw_noise(seeds[row - 1], shape, 0)[0] for row in rows.tolist()]))
            found.append(decoder(ddim(schedule, answers, noise, steps, guidance)).numpy())
        return np.concatenate(found)

    return draw


@torch.no_grad()
def reconstructed(pictures: np.ndarray, vae: Path, pipe: snoopi_rt.Pipeline | None = None) -> np.ndarray:
    """Pictures (N, H, W, 3) uint8 after an autoencoder: the best that any student with its decoder could draw.

    pipe: whose decoder takes the place of the autoencoder's own.
    """
    model = load_module(vae, AutoencoderTiny)

    def decode(latents: torch.Tensor) -> np.ndarray:
        return to_pictures(model.decoder(latents)) if pipe is None else pipe._decode(latents.numpy())

    return np.concatenate([decode(model.encoder(to_network(part))) for part in np.array_split(pictures, -(-len(pictures) // 64))])
