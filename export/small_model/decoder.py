"""The decoder stage of the small model: 16 x 16 latents to 256 x 256 pixels, trained on the pictures from which the latents were made."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from snoopi_rt.errors import InputError
from snoopi_rt.export.device import default_device
from snoopi_rt.export.small_model.dataset.build import TrainingSet, compose, read_seed
from snoopi_rt.export.small_model.dataset.compose import Composer
from snoopi_rt.export.small_model.dataset.scene import Vocabulary
from snoopi_rt.export.small_model.dataset.sprites import load_sprites
from snoopi_rt.export.small_model.features import FeatureMaps
from snoopi_rt.export.small_model.networks import PixelShuffleDecoder, decoder_of, to_pictures
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.optimise import MasterWeights, learning_rate
from snoopi_rt.export.weights.arrays import new_array
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.files import WEIGHTS, fingerprint, save_diffusers
from snoopi_rt.files import check_folder
from snoopi_rt.request import integer

SIDE = 256  # pixels
FACTOR = 16
WINDOW = 10  # latent cells that are decoded at once, of FACTOR x FACTOR pixels each
SHOWN = 8  # pictures in a grid of samples
MARGIN = 2  # cells along a window's sides that are not compared with the picture, unless the side is the picture's own


@dataclass(frozen=True)
class DecoderRecipe(loop.StageRecipe):
    """The settings of this stage. Raises InputError for values out of range."""

    steps: int = 3000
    batch: int = 16
    lr: float = 1e-3
    noise: float = 0.06
    """Largest deviation of the noise added to latents, so that neighbouring ones decode alike."""
    features: float = 0.5
    """Weight of the distance between early features."""
    images: int = 6000
    """Images of the set to train on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("images", self.images, 1)
        for name in ("noise", "features"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")


FORMER_NAMES = {"pictures": "images"}
"""As in training/recipes.py."""


def compared(corners: Tensor, cells: int) -> Tensor:
    """The pixels of windows that are compared with the picture, (B, 1, WINDOW * FACTOR, WINDOW * FACTOR) bool.

    corners: first row and column of each window (B, 2) in latents of cells x cells. Left out is the margin, which would be decoded
    differently if the window continued there.
    """
    inside = torch.arange(WINDOW)
    first, last = corners[..., None] == 0, corners[..., None] == cells - WINDOW
    sides = ((inside >= MARGIN) | first) & ((inside < WINDOW - MARGIN) | last)
    rows, columns = sides.repeat_interleave(FACTOR, -1).unbind(1)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def loss(
    decoder: Callable[[Tensor], Tensor],
    features: Callable[[Tensor], list[Tensor]],
    latents: Tensor,
    pictures: Tensor,
    mask: Tensor,
    weight: float,
) -> tuple[Tensor, Tensor]:
    """The loss and the L1 distance, scalars, of latents (B, 8, h, w), pictures (B, 3, H, W) and the mask of pixels to compare."""
    drawn = torch.where(mask, decoder(latents), pictures).contiguous(memory_format=torch.channels_last)
    error = drawn.float() - pictures.float()
    share = mask.float().mean()
    distance = error.abs().mean() / share
    early = torch.stack([(a - b).abs().mean() for a, b in zip(features(drawn), features(pictures), strict=True)]).sum()
    return distance + error.square().mean() / share + weight * early.float() / share, distance


def real_pictures(folder: Path, count: int, cache: Path) -> np.ndarray:
    """The first `count` pictures of a set at twice the size that its encoder saw, (N, 256, 256, 3) uint8, kept in the folder `cache`."""
    path = cache / f"pictures-{count}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        composer = Composer(load_sprites())
        vocabulary, seed = Vocabulary(composer.colourable()), read_seed(folder)
        beside = cache / f".pictures-{count}.part"
        pictures = new_array(beside, (count, SIDE, SIDE, 3), np.uint8)
        for i in tqdm(range(count), desc="images", unit="image"):
            pictures[i] = compose(composer, vocabulary, seed, i, SIDE)[1]
        pictures.flush()
        beside.replace(path)
    return np.load(path, mmap_mode="r")


Targets = Callable[[list[int], list[list[int]]], Tensor]
"""Pictures (B, 3, H, W), -1 to 1, of windows of latents: by the latents' numbers and each window's first row and column."""


def cut(latents: Tensor, numbers: list[int], corners: list[list[int]]) -> Tensor:
    """Windows (B, 8, WINDOW, WINDOW) fp32 of latents (N, 8, h, w)."""
    places = zip(numbers, corners, strict=True)
    return torch.stack([latents[n, :, y : y + WINDOW, x : x + WINDOW].float() for n, (y, x) in places])


def fit(
    stage: loop.Stage,
    model: PixelShuffleDecoder,
    latents: Tensor,
    targets: Targets,
    shown: np.ndarray,
    recipe: DecoderRecipe,
    compiled: bool,
) -> None:
    """Trains the decoder on latents (N, 8, h, w), and writes it in fp16. shown: what it should make of the first ones, for the samples."""
    torch.manual_seed(recipe.seed)
    device, form = default_device(), torch.channels_last
    weights = MasterWeights(model.to(device), ema=0.998)
    model.bfloat16().to(memory_format=form)
    features = FeatureMaps().to(device, torch.bfloat16).to(memory_format=form)
    compute = torch.compile(loss) if compiled else loss
    cells = latents.shape[-1]

    def step(i: int, random: torch.Generator) -> dict[str, float]:
        chosen = torch.randint(len(latents), (recipe.batch,), generator=random).tolist()
        # Windows that would begin outside are moved to the edge, so that edges are seen as often as the rest.
        corners = torch.randint(-MARGIN, cells - WINDOW + MARGIN + 1, (recipe.batch, 2), generator=random).clamp(0, cells - WINDOW)
        noisy, real = cut(latents, chosen, corners.tolist()), targets(chosen, corners.tolist())
        noisy += recipe.noise * torch.rand(recipe.batch, 1, 1, 1, generator=random) * torch.randn(noisy.shape, generator=random)
        seen, target = (array.to(device, torch.bfloat16).contiguous(memory_format=form) for array in (noisy, real))
        value, distance = compute(model.decoder, features, seen, target, compared(corners, cells).to(device), recipe.features)
        value.backward()
        norm = weights.step(learning_rate(recipe.lr, i, recipe.steps, decay_from=0.3))
        return {"loss": value.item(), "l1": distance.item(), "norm": norm}

    def averaged() -> PixelShuffleDecoder:
        return weights.averaged(PixelShuffleDecoder(**model.config))

    def sample(path: Path) -> None:
        rows = [np.concatenate(list(row), 1) for row in (shown, to_pictures(averaged(), latents[: len(shown)]))]
        Image.fromarray(np.concatenate(rows, 0)).save(path)

    loop.run(stage, {"decoder": weights}, step, sample)
    save_diffusers(averaged(), stage.folder)


def train(folder: Path, encoder: Path, out: Path, recipe: DecoderRecipe, compiled: bool = False) -> None:
    """Trains the decoder on a set's latents and pictures, and writes it to `out` in fp16.

    encoder: the folder of the set's autoencoder, with whose decoder stages the new decoder begins. Raises as loop.run does.
    """
    autoencoder = load_module(check_folder(encoder), AutoencoderTiny)
    latents = TrainingSet(folder).latents[: recipe.images]
    inputs = {"data": fingerprint(folder / "dataset.json"), "encoder": fingerprint(encoder / WEIGHTS)}
    stage = loop.Stage("decoder", out, recipe, inputs, sample_every=500, former_names=FORMER_NAMES)
    loop.first_step(stage)
    pictures = real_pictures(folder, len(latents), out)

    def targets(numbers: list[int], corners: list[list[int]]) -> Tensor:
        side = WINDOW * FACTOR
        places = zip(numbers, corners, strict=True)
        windows = np.stack([pictures[n, y * FACTOR :, x * FACTOR :][:side, :side] for n, (y, x) in places])
        return torch.from_numpy(windows).permute(0, 3, 1, 2).float().div(127.5).sub(1)

    torch.manual_seed(recipe.seed)  # for the layers that the autoencoder lacks
    fit(stage, decoder_of(autoencoder), latents, targets, pictures[:SHOWN], recipe, compiled)
