"""The backbone `pixart`: PixArt alpha (512, 1024) and sigma with T5."""

from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from snoopi_rt.bundle import Text
from snoopi_rt.engines.base import InputError
from snoopi_rt.export.backbones import Student, Weights
from snoopi_rt.export.backbones.network import load_decoder, load_network
from snoopi_rt.export.backbones.pixart import FoldedPixArt, GuidedPixArt
from snoopi_rt.export.preset import Preset
from snoopi_rt.export.text.rule import t5_rule
from snoopi_rt.export.text.t5 import T5Weights, reference_states, skeleton


def load(weights: Weights, preset: Preset, sizes: tuple[tuple[int, int], ...]) -> Student:
    """The modules of a PixArt folder. Its text encoder stays on disk: 4.7 B parameters. Raises InputError as load_module does."""
    network = load_network(weights, PixArtTransformer2DModel, "transformer")
    if network.config.use_additional_conditions and len(sizes) > 1:
        raise InputError("this PixArt is conditioned on the image's size, which is folded into its graph: export one --size a bundle")
    projection = network.caption_projection
    network.caption_projection = None
    encoder, tensor_of = skeleton(weights.folder / "text_encoder", projection), T5Weights(weights.folder / "text_encoder", projection)

    @torch.no_grad()
    def encode(prompts: list[Tensor]) -> list[dict[str, Tensor]]:
        return [{"states": projection(states)} for states in reference_states(weights.folder / "text_encoder", prompts)]

    def write_tokenizer(path: Path) -> Text:
        return t5_rule(weights.folder / "tokenizer", path, preset.max_tokens)

    return Student(
        text_encoder=encoder,
        text_outputs=("states",),
        encode=encode,
        generator=lambda guidance, empty: FoldedPixArt(network, preset.rule, guidance, empty, sizes[0]),
        reference=lambda guidance, empty: GuidedPixArt(network, preset.rule, guidance, empty, sizes[0]),
        decoder=load_decoder(weights, preset),
        write_tokenizer=write_tokenizer,
        channels=network.config.in_channels,
        tensor_of=tensor_of,
    )
