"""The networks of the small model, and the teacher's noise schedule."""

import copy

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, PixArtTransformer2DModel
from torch import nn

from snoopi_rt.export.attention import PlainAttention

LAYERS, HEADS, HEAD_SIZE = 8, 4, 64


def transformer(layers: int = LAYERS, heads: int = HEADS) -> PixArtTransformer2DModel:
    """Teacher and student, for latents (B, 8, 16, 16) and token states (B, T, 384): 9.2 M parameters in 8 layers of 4 heads."""
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
    nn.init.zeros_(model.proj_out.weight)  # the first answer is 0, the mean of v
    model.set_attn_processor(PlainAttention())
    return model


@torch.no_grad()
def deepened(start: PixArtTransformer2DModel, layers: int) -> PixArtTransformer2DModel:
    """A network of `layers` layers that computes what `start`, which has no more of them, does.

    Each new layer stands behind one of the old ones, spread evenly, and is its copy with output projections of zero, so that it adds
    nothing at first (Net2DeeperNet, Chen et al. 2016, for residual blocks).
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


def schedule() -> DDIMScheduler:
    """SD's beta schedule rescaled to zero terminal SNR, so that the last step is pure noise and background colours are learned."""
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


def autoencoder(decoder_channels: tuple[int, ...] = (32, 32, 32, 32)) -> AutoencoderTiny:
    """Pictures (B, 3, H, W) in [-1, 1] to latents (B, 8, H/8, W/8) and back; 0.37 M parameters."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=decoder_channels,
        num_encoder_blocks=(1, 1, 1, 2),
        num_decoder_blocks=(2, 2, 1, 1),
        latent_channels=8,
    )
