"""The backbone `small`: MiniLM token states, PixArt's own transformer at 6 M parameters, AutoencoderTiny."""

from pathlib import Path

import torch
from diffusers import AutoencoderTiny, PixArtTransformer2DModel
from torch import Tensor, nn

from snoopi_rt.export.backbones import Modules
from snoopi_rt.export.backbones.pixart import FoldedPixArt, GuidedPixArt
from snoopi_rt.export.one_step import OneStepRule
from snoopi_rt.export.text import minilm
from snoopi_rt.export.weights import require


class TextEncoder(nn.Module):
    """ids (B, T) int64 to states (B, T, D): the encoder, then the network's caption projection, so that both are cached with the prompt."""

    def __init__(self, encoder: nn.Module, projection: nn.Module):
        super().__init__()
        self.encoder, self.projection = encoder, projection

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.encoder.embeddings(input_ids=ids)
        for layer in self.encoder.encoder.layer:
            found = layer(embedded)
            embedded = found[0] if isinstance(found, tuple) else found
        return self.projection(embedded)


class Decoder(nn.Module):
    """latent (B, 8, h, w) to image (B, 8 h, 8 w, 3) uint8."""

    def __init__(self, autoencoder: AutoencoderTiny):
        super().__init__()
        self.decoder, self.scale = autoencoder.decoder, autoencoder.config.scaling_factor

    def forward(self, latent: Tensor) -> Tensor:
        image = self.decoder(latent / self.scale).permute(0, 2, 3, 1)
        return (image * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def load(folder: Path, rule: OneStepRule) -> Modules:
    """The modules of a folder that `train student` wrote (transformer/, vae/). Raises InputError where a part is missing."""
    for part in ("transformer", "vae"):
        require(folder / part, "train student")
    network = PixArtTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32).eval().requires_grad_(False)
    autoencoder = AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval().requires_grad_(False)
    encoder = TextEncoder(minilm.load_text_encoder(), network.caption_projection)
    network.caption_projection = None
    return Modules(
        text_encoder=encoder,
        generator=lambda guidance, empty: FoldedPixArt(network, rule, guidance, empty),
        reference=lambda guidance, empty: GuidedPixArt(network, rule, guidance, empty),
        decoder=Decoder(autoencoder),
        tokenizer=minilm.folder() / "tokenizer.json",
    )
