"""The autoencoder stage: AutoencoderTiny of factor 8 with 8 latent channels, trained on random crops."""

import math
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor, nn

from snoopi_rt.errors import InputError
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.optimise import MasterWeights, learning_rate
from snoopi_rt.export.training.small.emoji import open_pictures, read_rows
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.files import fingerprint, save_diffusers

CROP = 64  # a crop trains 4 to 5 times faster than the whole picture, and the network is convolutional


@dataclass(frozen=True)
class Recipe(loop.StageRecipe):
    """The settings of this stage.

    noise: deviation of what is added to each latent, so that neighbours decode alike. grid: crops begin at multiples of it, in pixels; at 8
    the decoder always sees pictures as they lie on the latents' own grid, and with them the cells of a pixelated one.
    """

    steps: int = 5000
    batch: int = 32
    lr: float = 2e-3
    noise: float = 0.02
    grid: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.noise < math.inf:
            raise InputError(f"noise must not be negative, got {self.noise}")
        if self.grid < 1 or CROP % self.grid:
            raise InputError(f"grid must divide {CROP}, got {self.grid}")


def network() -> AutoencoderTiny:
    """The autoencoder of the small backbone: (B, 3, H, W) in [-1, 1] to (B, 8, H/8, W/8) and back; 0.37 M parameters."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(1, 1, 1, 2),
        num_decoder_blocks=(2, 2, 1, 1),
        latent_channels=8,
    )


def loss(autoencoder: AutoencoderTiny, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The scalar loss and the mean squared error of the reconstruction, for pictures (B, 3, H, W) in [-1, 1] and what is added to their
    latents (B, 8, H/8, W/8).

    L1 + L2 + half the L1 of the 4x4 means; a pull towards mean 0 and deviation 1 a channel saves the diffusion a scaling factor.
    """
    latents = autoencoder.encoder(pictures)
    decoded = autoencoder.decoder(latents + noise).float()
    error = decoded - pictures.float()
    spread = latents.float()
    pull = spread.mean((0, 2, 3)).square().mean() + (spread.std((0, 2, 3)) - 1).square().mean()
    mse = error.square().mean()
    return error.abs().mean() + mse + 0.5 * nn.functional.avg_pool2d(error, 4).abs().mean() + 0.02 * pull, mse


def to_network(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_pictures(decoded: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] to uint8 (B, H, W, 3)."""
    return decoded.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def train(pictures_folder: Path, out: Path, recipe: Recipe, compiled: bool = False, start: Path | None = None) -> None:
    """Trains the autoencoder on the training pictures and writes it to `out` in diffusers layout, fp16.

    start: an autoencoder whose decoder alone is trained on, so that the latents of networks that were trained with it stay what they are.
    """
    usable = np.array([i for i, row in enumerate(read_rows(pictures_folder)) if row.split == "train"])
    pictures = open_pictures(pictures_folder)
    torch.manual_seed(recipe.seed)
    first = network() if start is None else load_module(start, AutoencoderTiny)
    model = deepcopy(first).bfloat16().requires_grad_(True)
    model.encoder.requires_grad_(start is None)
    weights = MasterWeights(model, ema=0.995)
    compute = torch.compile(loss) if compiled else loss

    def step(i: int, random: torch.Generator) -> dict[str, float]:
        chosen = usable[torch.randint(len(usable), (recipe.batch,), generator=random).numpy()]
        places = (pictures.shape[1] - CROP) // recipe.grid + 1
        corners = (torch.randint(places, (recipe.batch, 2), generator=random) * recipe.grid).tolist()
        crops = np.stack([pictures[n, y : y + CROP, x : x + CROP] for n, (y, x) in zip(chosen, corners, strict=True)])
        noise = recipe.noise * torch.randn(recipe.batch, 8, CROP // 8, CROP // 8, generator=random)
        value, mse = compute(model, to_network(crops).bfloat16(), noise.bfloat16())
        value.backward()
        norm = weights.step(learning_rate(recipe.lr, i, recipe.steps, decay_from=0.3))
        return {"loss": value.item(), "mse": mse.item(), "norm": norm}

    def averaged() -> AutoencoderTiny:
        return weights.averaged(deepcopy(first))

    @torch.no_grad()
    def sample(path: Path) -> None:
        originals = np.asarray(pictures[usable[:8]])
        copy = averaged()
        decoded = to_pictures(copy.decoder(copy.encoder(to_network(originals))))
        Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in (originals, decoded)], 0)).save(path)

    inputs = {"data": fingerprint(pictures_folder / "dataset.json")}
    if start is not None:
        inputs["start"] = fingerprint(*sorted(start.glob("*.safetensors")))
    stage = loop.Stage("autoencoder", out, recipe, inputs)
    loop.run(stage, {"autoencoder": weights}, step, sample)
    save_diffusers(averaged(), out)
