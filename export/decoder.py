"""The decoder of a student: a clean latent to an image, through AutoencoderKL or AutoencoderTiny (TAESD)."""

import math

import torch
from torch import Tensor, nn

from snoopi_rt.errors import InputError


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

    def forward(self, latent: Tensor) -> Tensor:
        image = self.pixels(latent).permute(0, 2, 3, 1)
        # The steps of diffusers' VaeImageProcessor: with 127.5 as one factor, some pixels would round the other way.
        return ((image * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    def pixels(self, latent: Tensor) -> Tensor:
        """The image before it is rounded, (B, 3, H, W), about -1 to 1."""
        return self.decoder(self.post_quant_conv(latent / self.scale + self.shift))
