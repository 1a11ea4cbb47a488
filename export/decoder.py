"""The decoder of a student: a clean latent to an image, through AutoencoderKL, AutoencoderDC (SANA's) or AutoencoderTiny (TAESD)."""

import math

import torch
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
from torch import Tensor, nn

from snoopi_rt.errors import InputError
from snoopi_rt.export.attention import linear_attention


class Decoder(nn.Module):
    """latent (B, C, h, w) to image (B, H, W, 3) uint8, in all levels equal to diffusers': undo the scale of `vae`, decode, round.

    AutoencoderTiny takes the scaled latent itself, hence its scaling_factor of 1. Raises InputError for a vae that normalises
    its channels one by one.
    """

    def __init__(self, vae: nn.Module):
        super().__init__()
        if getattr(vae.config, "latents_mean", None) is not None:
            raise InputError("this vae normalises its channels one by one (latents_mean in its config), which is not supported")
        self.scale, self.shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
        for key, value in (("scaling_factor", self.scale), ("shift_factor", self.shift)):
            if type(value) not in (int, float) or not math.isfinite(value) or (key == "scaling_factor" and value <= 0):
                raise InputError(f"this vae has {key} {value!r} in its config, which is no number to scale by")
        self.post_quant_conv = getattr(vae, "post_quant_conv", None) or nn.Identity()
        self.decoder = vae.decoder
        for module in self.decoder.modules():
            if isinstance(module, SanaMultiscaleLinearAttention) and module.norm_type == "rms_norm":
                module.processor = multiscale_attention

    def forward(self, latent: Tensor) -> Tensor:
        image = self.pixels(latent).permute(0, 2, 3, 1)
        # The steps of diffusers' VaeImageProcessor: with 127.5 as one factor, some pixels would round the other way.
        return ((image * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    def pixels(self, latent: Tensor) -> Tensor:
        """The image before it is rounded, (B, 3, H, W), about -1 to 1."""
        return self.decoder(self.post_quant_conv(latent / self.scale + self.shift))


def multiscale_attention(attn: SanaMultiscaleLinearAttention, hidden_states: Tensor) -> Tensor:
    """A processor for the attention of AutoencoderDC, hidden_states (B, C, h, w) to the same: the linear form at every size;
    for latents of few pixels diffusers writes the same out with all weights."""
    size, tokens = hidden_states.shape[-2:], hidden_states.movedim(1, -1)
    own = torch.cat([attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)], 3).movedim(-1, 1)
    scales = torch.cat([own, *(scale(own) for scale in attn.to_qkv_multiscale)], 1)
    q, k, v = scales.flatten(2).unflatten(1, (-1, 3 * attn.attention_head_dim)).transpose(-1, -2).chunk(3, -1)
    z = linear_attention(q, k, v).transpose(-1, -2).flatten(1, 2).unflatten(2, size)
    return hidden_states + attn.norm_out(attn.to_out(z.movedim(1, -1))).movedim(-1, 1)
