"""The backbone `sana`: SANA-Sprint with Gemma 2 as its text encoder and a decoder with a scale factor of 32."""

from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from snoopi_rt.bundle.bundle import Text
from snoopi_rt.errors import InputError
from snoopi_rt.export.backbones import Student, Weights
from snoopi_rt.export.backbones.network import load_decoder
from snoopi_rt.export.backbones.sana import FoldedSana, GuidedSana, check_config
from snoopi_rt.export.presets.preset import Preset
from snoopi_rt.export.text.gemma import GemmaWeights, InstructedGemma, instruction
from snoopi_rt.export.text.rule import gemma_rule, gemma_tokenizer
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.lora import NETWORK, merge_loras


def load(weights: Weights, preset: Preset, sizes: tuple[tuple[int, int], ...]) -> Student:
    """The modules of a SANA-Sprint folder. Its text encoder stays on disk: 2.6 B parameters. Raises InputError as load_module does."""
    network = load_module(weights.folder / "transformer", SanaTransformer2DModel, weights.network)
    check_config(network)
    told, tokenizer = instruction(), weights.folder / "tokenizer"
    *known, _ = gemma_tokenizer(tokenizer)(told).input_ids
    gemma = InstructedGemma(weights.folder / "text_encoder", known, preset.max_tokens)
    if gemma.config.hidden_size != (width := network.config.caption_channels):
        raise InputError(
            f"the Gemma in {gemma.folder} gives states of {gemma.config.hidden_size}, the network takes {width}: "
            "choose the one it was trained with"
        )
    encoder = gemma.skeleton(nn.Sequential(network.caption_projection, network.caption_norm))
    updates = merge_loras(weights.loras, {NETWORK: network, "text_encoder": encoder})
    projection = nn.Sequential(network.caption_projection, network.caption_norm)
    network.caption_projection = network.caption_norm = nn.Identity()
    weight_of = GemmaWeights(gemma.folder, projection, updates)

    def tensor_of(name: str) -> Tensor:
        constants = gemma.constants(updates)
        return constants[name] if name in constants else weight_of(name)

    @torch.no_grad()
    def encode(ids: list[Tensor]) -> list[dict[str, Tensor]]:
        return [{"states": projection(states)} for states in gemma.states(ids, updates)]

    def write_tokenizer(path: Path) -> Text:
        return gemma_rule(tokenizer, path, preset.max_tokens, gemma.config.vocab_size, told)

    return Student(
        text_encoder=encoder,
        text_outputs=("states",),
        encode=encode,
        generator=lambda guidance, empty: FoldedSana(network, preset.rule, guidance, empty, preset.embedded_guidance),
        reference=lambda guidance, empty: GuidedSana(network, preset.rule, guidance, empty, preset.embedded_guidance),
        decoder=load_decoder(weights),
        write_tokenizer=write_tokenizer,
        tensor_of=tensor_of,
    )
