"""The networks of the small model, and the teacher's noise schedule."""

import copy
import itertools

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, ModelMixin, PixArtTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock, DecoderTiny
from torch import Tensor, nn

from snoopi_rt.export.attention import PlainAttention

LAYERS, HEADS, HEAD_SIZE = 8, 4, 64


def transformer(layers: int = LAYERS, heads: int = HEADS) -> PixArtTransformer2DModel:
    """Teacher and student, for latents (B, 8, 16, 16) and token states (B, T, 384): 9.1 M parameters in 8 layers of 4 heads."""
    model = PixArtTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD_SIZE,
        in_channels=8,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=heads * HEAD_SIZE,
        sample_size=16,
        patch_size=2,
        caption_channels=384,
        use_additional_conditions=False,
    )
    nn.init.zeros_(model.proj_out.weight)  # the first prediction is 0, the mean of v
    model.set_attn_processor(PlainAttention())
    return model


@torch.no_grad()
def deepened(start: PixArtTransformer2DModel, layers: int) -> PixArtTransformer2DModel:
    """A deeper network that computes the same as `start`. Raises ValueError for fewer layers than it has.

    New layers are spread evenly. Each follows an old one and is its copy with output projections of zero, so that it adds nothing at first
    (Net2DeeperNet, Chen et al. 2016, for residual blocks).
    """
    old = len(start.transformer_blocks)
    if layers < old:
        raise ValueError(f"{layers} layers are fewer than {old}")
    model = transformer(layers, start.config.num_attention_heads)
    blocks = nn.ModuleList()
    for number, block in enumerate(start.transformer_blocks):
        blocks.append(copy.deepcopy(block))
        for _ in range((number + 1) * (layers - old) // old - number * (layers - old) // old):
            added = copy.deepcopy(block)
            for projection in (added.attn1.to_out[0], added.attn2.to_out[0], added.ff.net[2]):
                nn.init.zeros_(projection.weight)
                nn.init.zeros_(projection.bias)
            blocks.append(added)
    rest = {name: value for name, value in start.state_dict().items() if not name.startswith("transformer_blocks.")}
    model.load_state_dict({**rest, **{f"transformer_blocks.{name}": value for name, value in blocks.state_dict().items()}})
    return model


def scheduler() -> DDIMScheduler:
    """SD's beta schedule rescaled to zero terminal SNR: the last timestep is pure noise, so that background colours are learned."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


class PixelShuffleDecoder(ModelMixin, ConfigMixin):
    """AutoencoderTiny's decoder with one more stage: latents (B, 8, h, w) to pictures (B, 3, 16 h, 16 w) in [-1, 1]; 0.2 M parameters.

    The last stage works on the 16 channels that a pixel shuffle leaves: 32 at full resolution would take twice as long as all the rest.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 8,
        channels: int = 32,
        blocks: tuple[int, ...] = (2, 2, 1, 1),
        last_channels: int = 16,
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        self.decoder = _Decoder(latent_channels, channels, blocks, last_channels)


class _Decoder(nn.Module):
    def __init__(self, latent_channels: int, channels: int, blocks: tuple[int, ...], last_channels: int):
        super().__init__()
        tiny = DecoderTiny(
            latent_channels, 3, blocks, (channels,) * len(blocks), upsampling_scaling_factor=2, act_fn="relu", upsample_fn="nearest"
        )
        self.layers = tiny.layers[:-1]
        self.last = nn.Sequential(
            nn.Conv2d(channels, 4 * last_channels, 3, padding=1),
            nn.PixelShuffle(2),
            AutoencoderTinyBlock(last_channels, last_channels, "relu"),
            nn.Conv2d(last_channels, 3, 3, padding=1),
        )

    def forward(self, latent: Tensor) -> Tensor:
        return self.last(self.layers(torch.tanh(latent / 3) * 3)).mul(2).sub(1)


class WideDecoder(ModelMixin, ConfigMixin):
    """Latents (B, 8, h, w) to pictures (B, 3, 16 h, 16 w), about -1 to 1; 1.8 M parameters.

    Nearly all of them work where pictures are smallest and a parameter costs least: they know what is shown, and restore what the latents
    have lost of it. It takes about as long as a decoder with a ninth of the parameters whose stages are all of 32 channels.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 8,
        channels: tuple[int, int, int, int] = (128, 64, 32, 16),
        blocks: tuple[int, int, int, int] = (4, 2, 1, 1),
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        self.decoder = _WideDecoder(latent_channels, channels, blocks)


class _WideDecoder(nn.Module):
    def __init__(self, latent_channels: int, channels: tuple[int, int, int, int], blocks: tuple[int, int, int, int]):
        super().__init__()
        stages = [[_ResidualBlock(width, pad) for _ in range(depth)] for width, depth, pad in zip(channels, blocks, PADDING, strict=True)]
        ups = [_doubled(width, following, pad) for (width, following), pad in zip(itertools.pairwise(channels), PADDING, strict=False)]
        first, pixels = _conv(latent_channels, channels[0], PADDING[0]), _conv(channels[3], 4 * 3, PADDING[3])
        self.low = nn.Sequential(first, *stages[0], *ups[0], *stages[1], *ups[1])
        self.high = nn.Sequential(*stages[2], *ups[2], *stages[3], nn.ReLU(), pixels, nn.PixelShuffle(2))

    def forward(self, latent: Tensor) -> Tensor:
        return self.high(self.low(torch.tanh(latent / 3) * 3))

    def windows(self, latent: Tensor, corners: list[list[int]], side: int) -> Tensor:
        """Windows (B, 3, HIGH * side, HIGH * side) of the pictures, at these rows and columns of the map that `high` takes.

        They are what the whole pictures have there, at less cost: `high` sees no further than the margin.
        """
        maps = self.low(torch.tanh(latent / 3) * 3)
        cells, around = maps.shape[-1], min(side + 2 * MARGIN, maps.shape[-1])
        starts = [[min(max(place - MARGIN, 0), cells - around) for place in corner] for corner in corners]
        pieces = torch.stack([row[:, y : y + around, x : x + around] for row, (y, x) in zip(maps, starts, strict=True)])
        cut = []
        for piece, corner, start in zip(self.high(pieces), corners, starts, strict=True):
            y, x = (HIGH * (place - begin) for place, begin in zip(corner, start, strict=True))
            cut.append(piece[:, y : y + HIGH * side, x : x + HIGH * side])
        return torch.stack(cut)


PADDING = ("zeros", "zeros", "reflect", "reflect")
"""What WideDecoder's four stages see beyond the edges. Zeros would show along the picture's sides and in its corners; a reflection goes on
as a plain colour does, also through the pixel shuffles, whose maps may alternate from cell to cell."""
HIGH = 4
"""Pixels per cell, to a side, of the map that WideDecoder's last part takes."""
MARGIN = 8
"""Cells by which that part sees further than a window, or more."""


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, pad: str):
        super().__init__()
        self.a, self.b = (_conv(channels, channels, pad) for _ in range(2))
        nn.init.zeros_(self.b.weight)  # it adds nothing at first
        nn.init.zeros_(self.b.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.b(torch.relu(self.a(torch.relu(hidden))))


def _doubled(channels: int, to: int, pad: str) -> tuple[nn.Module, ...]:
    """Layers that double a map's side."""
    return nn.ReLU(), _conv(channels, 4 * to, pad), nn.PixelShuffle(2)


def _conv(channels: int, to: int, pad: str) -> nn.Conv2d:
    return nn.Conv2d(channels, to, 3, padding=1, padding_mode=pad)


def decoder_of(autoencoder: AutoencoderTiny) -> PixelShuffleDecoder:
    """A decoder to pictures of twice the size, whose first stages are those of an autoencoder."""
    config = autoencoder.config
    model = PixelShuffleDecoder(config.latent_channels, config.decoder_block_out_channels[0], tuple(config.num_decoder_blocks))
    model.decoder.layers.load_state_dict(autoencoder.decoder.layers[:-1].state_dict())
    return model


@torch.no_grad()
def to_pictures(model: PixelShuffleDecoder | WideDecoder, latents: Tensor) -> np.ndarray:
    """Pictures (B, 256, 256, 3) uint8 of latents (B, 8, 16, 16)."""
    pictures = torch.cat([model.decoder(part.to(model.device).float()) for part in latents.split(16)])
    return pictures.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
