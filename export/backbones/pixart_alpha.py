"""The backbone `pixart`: PixArt alpha (512, 1024) and sigma with T5."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from snoopi_rt.bundle.bundle import Text
from snoopi_rt.errors import InputError
from snoopi_rt.export.backbones import CaptionEncoder, Denoiser, Student, Weights
from snoopi_rt.export.backbones.network import load_decoder
from snoopi_rt.export.backbones.pixart import FoldedPixArt, GuidedPixArt, pixart_prediction
from snoopi_rt.export.presets.preset import Preset
from snoopi_rt.export.text.rule import t5_rule
from snoopi_rt.export.text.t5 import T5Weights, reference_states, skeleton, t5_config
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.lora import NETWORK, Product, merge_loras


def load(weights: Weights, preset: Preset, sizes: tuple[tuple[int, int], ...]) -> Student:
    """The modules of a PixArt folder. Its text encoder stays on disk: 4.7 B parameters. Raises InputError as load_module does."""
    network = load_module(weights.folder / "transformer", PixArtTransformer2DModel, weights.network)
    if network.config.use_additional_conditions and len(sizes) > 1:
        raise InputError("this PixArt is conditioned on the image's size, which is folded into its graph: export one --size per bundle")
    text_encoder = weights.folder / "text_encoder"
    encoder = skeleton(text_encoder, network.caption_projection)
    updates = merge_loras(weights.loras, {NETWORK: network, "text_encoder": encoder})
    projection = network.caption_projection
    network.caption_projection = None
    tensor_of = T5Weights(text_encoder, projection, updates)

    prompts = caption_encoder(weights.folder, preset.max_tokens, updates)

    @torch.no_grad()
    def encode(ids: list[Tensor]) -> list[dict[str, Tensor]]:
        return [{"states": projection(states)} for states in prompts.encode(ids)]

    return Student(
        text_encoder=encoder,
        text_outputs=("states",),
        encode=encode,
        generator=lambda guidance, empty: FoldedPixArt(network, preset.rule, guidance, empty, sizes[0]),
        reference=lambda guidance, empty: GuidedPixArt(network, preset.rule, guidance, empty, sizes[0]),
        decoder=load_decoder(weights),
        write_tokenizer=prompts.write_tokenizer,
        tensor_of=tensor_of,
    )


def caption_encoder(folder: Path, max_tokens: int, updates: Mapping[str, Sequence[Product]] | None = None) -> CaptionEncoder:
    """T5, one layer in memory at a time. `updates`: what LoRAs add to its weights, by parameter name."""

    def write_tokenizer(path: Path) -> Text:
        return t5_rule(folder / "tokenizer", path, max_tokens, t5_config(folder / "text_encoder").vocab_size)

    return CaptionEncoder(write_tokenizer, lambda ids: reference_states(folder / "text_encoder", ids, updates))


LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
DENOISER = Denoiser(
    PixArtTransformer2DModel,
    "transformer",
    pixart_prediction,
    LORA_TARGETS,
    # Errors of epsilon grow by 2 in x0 here, and by 157 at 999.
    timestep=400,
    masked=True,
    caption_encoder=caption_encoder,
)
