"""The decoder of the small model, 16 x 16 latents to 256 x 256 pixels, and the stage that trains it on real pictures."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock, DecoderTiny
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from snoopi_rt.engines.base import InputError
from snoopi_rt.export.small_model.dataset.build import TrainingSet, compose, read_seed
from snoopi_rt.export.small_model.dataset.compose import Composer
from snoopi_rt.export.small_model.dataset.scene import Vocabulary
from snoopi_rt.export.small_model.dataset.sprites import load_sprites
from snoopi_rt.export.small_model.features import EarlyFeatures
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.optimise import MasterWeights, learning_rate
from snoopi_rt.export.weights.files import WEIGHTS, fingerprint, save_diffusers

SIDE = 256  # pixels
FACTOR = 16
CROP = 6  # latent cells of a crop that is compared with the picture, each of FACTOR x FACTOR pixels
MARGIN = 2  # cells around it that are decoded, too, and not compared


class PixelShuffleDecoder(ModelMixin, ConfigMixin):
    """AutoencoderTiny's decoder with one stage more: latents (B, 8, h, w) to pictures (B, 3, 16 h, 16 w) in [-1, 1]; 0.3 M parameters.

    The last stage works on 16 channels that a pixel shuffle makes of the stage before: 32 at full resolution would take twice as long as
    all else.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 8,
        channels: int = 32,
        blocks: tuple[int, ...] = (2, 2, 1, 1),
        last_channels: int = 16,
        last_blocks: int = 1,
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        self.decoder = _Decoder(latent_channels, channels, blocks, last_channels, last_blocks)


class _Decoder(nn.Module):
    def __init__(self, latent_channels: int, channels: int, blocks: tuple[int, ...], last_channels: int, last_blocks: int):
        super().__init__()
        tiny = DecoderTiny(
            latent_channels, 3, blocks, (channels,) * len(blocks), upsampling_scaling_factor=2, act_fn="relu", upsample_fn="nearest"
        )
        self.layers = tiny.layers[:-1]
        self.last = nn.Sequential(
            nn.Conv2d(channels, 4 * last_channels, 3, padding=1),
            nn.PixelShuffle(2),
            *(AutoencoderTinyBlock(last_channels, last_channels, "relu") for _ in range(last_blocks)),
            nn.Conv2d(last_channels, 3, 3, padding=1),
        )

    def forward(self, latent: Tensor) -> Tensor:
        return self.last(self.layers(torch.tanh(latent / 3) * 3)).mul(2).sub(1)


@dataclass(frozen=True)
class Recipe(loop.Recipe):
    """The settings of this stage.

    noise: deviation of what is added to the latents, so that neighbours decode alike. features: weight of the distance in early features.
    """

    steps: int = 6000
    batch: int = 24
    lr: float = 2e-3
    noise: float = 0.06
    features: float = 0.5
    pictures: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.noise < math.inf:
            raise InputError(f"noise must not be negative, got {self.noise}")


def loss(
    decoder: Callable[[Tensor], Tensor], features: Callable[[Tensor], list[Tensor]], latents: Tensor, pictures: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """The scalar loss and the L1 distance, for latents (B, 8, h, w) and the pictures (B, 3, H, W) of their inner cells."""
    edge = MARGIN * FACTOR
    inner = decoder(latents)[..., edge:-edge, edge:-edge].contiguous(memory_format=torch.channels_last)
    error = inner.float() - pictures.float()
    distance = error.abs().mean()
    early = torch.stack([(a - b).abs().mean() for a, b in zip(features(inner), features(pictures), strict=True)]).sum()
    return distance + error.square().mean() + weight * early.float(), distance


def initial(autoencoder: AutoencoderTiny) -> PixelShuffleDecoder:
    """A decoder whose first stages are those of an autoencoder of factor 8."""
    config = autoencoder.config
    model = PixelShuffleDecoder(config.latent_channels, config.decoder_block_out_channels[0], tuple(config.num_decoder_blocks))
    model.decoder.layers.load_state_dict(autoencoder.decoder.layers[:-1].state_dict())
    return model


def real_pictures(folder: Path, count: int, cache: Path) -> np.ndarray:
    """The first `count` pictures of a set at twice the size that the encoder saw, (N, 256, 256, 3) uint8, kept in the folder `cache`."""
    path = cache / f"pictures-{count}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        composer = Composer(load_sprites(folder / "npm"))
        vocabulary, seed = Vocabulary(composer.colourable()), read_seed(folder)
        beside = cache / f".pictures-{count}.part"
        pictures = np.lib.format.open_memmap(beside, mode="w+", dtype=np.uint8, shape=(count, SIDE, SIDE, 3))
        for i in tqdm(range(count), desc="pictures", unit="picture"):
            pictures[i] = compose(composer, vocabulary, seed, i, SIDE)[1]
        pictures.flush()
        beside.replace(path)
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def decoded(model: PixelShuffleDecoder, latents: Tensor) -> np.ndarray:
    """Pictures (B, 256, 256, 3) uint8 of latents (B, 8, 16, 16)."""
    pictures = torch.cat([model.decoder(part.float()) for part in latents.split(16)])
    return pictures.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def train(folder: Path, autoencoder: Path, out: Path, recipe: Recipe, compiled: bool = False) -> None:
    """Trains the decoder on a set's latents and pictures, its first stages from `autoencoder`, and writes it to `out`, fp16."""
    latents = TrainingSet(folder).latents[: recipe.pictures]
    pictures = real_pictures(folder, len(latents), out)
    torch.manual_seed(recipe.seed)
    model = initial(AutoencoderTiny.from_pretrained(autoencoder))
    weights = MasterWeights(model, ema=0.998)
    model.bfloat16().to(memory_format=torch.channels_last)
    features = EarlyFeatures().bfloat16().to(memory_format=torch.channels_last)
    compute = torch.compile(loss) if compiled else loss
    cells = latents.shape[-1]
    whole = CROP + 2 * MARGIN

    def step(i: int, random: torch.Generator) -> dict[str, float]:
        chosen = torch.randint(len(latents), (recipe.batch,), generator=random).tolist()
        corners = torch.randint(cells - CROP + 1, (recipe.batch, 2), generator=random).tolist()
        parts, targets = [], []
        for n, (y, x) in zip(chosen, corners, strict=True):
            # Beyond the picture's own edge the decoder sees zeros, as it does in use; here they are the latent's nearest cells.
            padded = nn.functional.pad(latents[n].float()[None], (MARGIN,) * 4, mode="replicate")[0]
            parts.append(padded[:, y : y + whole, x : x + whole])
            targets.append(pictures[n, y * FACTOR : (y + CROP) * FACTOR, x * FACTOR : (x + CROP) * FACTOR])
        noisy = torch.stack(parts)
        noisy += recipe.noise * torch.rand(recipe.batch, 1, 1, 1, generator=random) * torch.randn(noisy.shape, generator=random)
        wanted = torch.from_numpy(np.stack(targets)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        arrays = [array.bfloat16().contiguous(memory_format=torch.channels_last) for array in (noisy, wanted)]
        value, distance = compute(model.decoder, features, arrays[0], arrays[1], recipe.features)
        value.backward()
        norm = weights.step(learning_rate(recipe.lr, i, recipe.steps, decay_from=0.3))
        return {"loss": value.item(), "l1": distance.item(), "norm": norm}

    def averaged() -> PixelShuffleDecoder:
        copy = PixelShuffleDecoder(**model.config)
        copy.load_state_dict({**copy.state_dict(), **weights.averaged()})
        return copy.eval()

    def sample(path: Path) -> None:
        drawn = decoded(averaged(), latents[:8])
        rows = [np.concatenate(list(row), 1) for row in (pictures[:8], drawn)]
        Image.fromarray(np.concatenate(rows, 0)).save(path)

    inputs = {"data": fingerprint(folder / "dataset.json"), "autoencoder": fingerprint(autoencoder / WEIGHTS)}
    loop.run(loop.Stage("decoder", out, recipe, inputs, sample_every=500), {"decoder": weights}, step, sample)
    save_diffusers(averaged(), out)
