"""The backbone `small`: MiniLM token states, PixArt's own transformer at 9.1 M parameters, AutoencoderTiny."""

import shutil
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from snoopi_rt.bundle.bundle import File, Text
from snoopi_rt.export.backbones import CaptionEncoder, Denoiser, Student, Weights
from snoopi_rt.export.backbones.network import load_decoder
from snoopi_rt.export.backbones.pixart import FoldedPixArt, GuidedPixArt, pixart_prediction
from snoopi_rt.export.backbones.pixart_alpha import LORA_TARGETS
from snoopi_rt.export.device import default_device
from snoopi_rt.export.presets.preset import Preset
from snoopi_rt.export.small_model.bundle_vocabulary import EXAMPLES, vocabulary
from snoopi_rt.export.text import minilm
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.files import require
from snoopi_rt.export.weights.lora import NETWORK, merge_loras
from snoopi_rt.kernels import attention


class TextEncoder(nn.Module):
    """ids (B, T) int64 to states (B, T, D): the encoder, then the network's caption projection, so that both are cached with a prompt."""

    def __init__(self, encoder: nn.Module, projection: nn.Module):
        super().__init__()
        self.encoder, self.projection = encoder, projection

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.encoder.embeddings(input_ids=ids)
        for layer in self.encoder.encoder.layer:
            outputs = layer(embedded)
            embedded = outputs[0] if isinstance(outputs, tuple) else outputs
        return self.projection(embedded)


def load(weights: Weights, preset: Preset, sizes: tuple[tuple[int, int], ...]) -> Student:
    """The modules of a folder that `train student` wrote (transformer/, vae/). Raises InputError if a part is missing."""
    for part in ("transformer", "vae"):
        require(weights.folder / part, "train student")
    network = load_module(weights.folder / "transformer", PixArtTransformer2DModel, weights.network)
    merge_loras(weights.loras, {NETWORK: network})
    encoder = TextEncoder(minilm.load_text_encoder(), network.caption_projection)
    network.caption_projection = None

    @torch.no_grad()
    def encode(prompts: list[Tensor]) -> list[dict[str, Tensor]]:
        return [{"states": encoder(ids)} for ids in prompts]

    return Student(
        text_encoder=encoder,
        text_outputs=("states",),
        encode=encode,
        # Token rows are short here: attention written out is the faster one.
        generator=lambda guidance, empty: FoldedPixArt(network, preset.rule, guidance, empty, sizes[0], attention, attention),
        reference=lambda guidance, empty: GuidedPixArt(network, preset.rule, guidance, empty, sizes[0]),
        decoder=load_decoder(weights),
        write_tokenizer=caption_encoder(weights.folder, preset.max_tokens).write_tokenizer,
        vocabulary=vocabulary(),
        examples=EXAMPLES,
    )


def caption_encoder(folder: Path, max_tokens: int) -> CaptionEncoder:
    """MiniLM as it ships in bundles: it is not in a teacher's folder."""

    def write_tokenizer(path: Path) -> Text:
        shutil.copyfile(minilm.folder() / "tokenizer.json", path)
        return Text(File.of(path), max_tokens, lowercase=True)

    @torch.no_grad()
    def encode(prompts: list[Tensor]) -> list[Tensor]:
        device = default_device()
        encoder = minilm.text_encoder_on(device)
        return [encoder(ids.to(device)).last_hidden_state.cpu() for ids in prompts]

    return CaptionEncoder(write_tokenizer, encode)


# Zero terminal SNR: at 999 the noise is pure and x0 = -v.
DENOISER = Denoiser(
    PixArtTransformer2DModel, "transformer", pixart_prediction, LORA_TARGETS, timestep=999, masked=True, caption_encoder=caption_encoder
)
