"""The backbones `sd15`, `sd21` and `sdxl`: a UNet and one or two CLIP text encoders."""

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from snoopi_rt.bundle.bundle import Text
from snoopi_rt.errors import InputError
from snoopi_rt.export.backbones import CaptionEncoder, Denoiser, Student, Weights
from snoopi_rt.export.backbones.network import load_decoder
from snoopi_rt.export.backbones.unet import FoldedUNet, GuidedUNet, unet_prediction
from snoopi_rt.export.presets.preset import Preset
from snoopi_rt.export.text.clip import ClipTextEncoder, SdxlTextEncoder
from snoopi_rt.export.text.rule import CLIP_TOKENS, clip_rule, clip_tokenizer
from snoopi_rt.export.weights.checkpoint import config_path, load_module, read_config, transformers_config
from snoopi_rt.export.weights.lora import NETWORK, TEXT_ENCODERS, merge_loras


def load(weights: Weights, preset: Preset, sizes: tuple[tuple[int, int], ...]) -> Student:
    """The modules of a Stable Diffusion folder. Raises InputError as load_module does."""
    network = load_module(weights.folder / "unet", UNet2DConditionModel, weights.network)
    conditioned = network.config.addition_embed_type is not None
    if conditioned != (preset.backbone == "sdxl"):
        raise InputError(f"this UNet {'is' if conditioned else 'is not'} SDXL's, and preset {preset.name} is for {preset.backbone}")
    if conditioned and len(sizes) > 1:
        raise InputError("this UNet is conditioned on the image's size, which is folded into its graph: export one --size per bundle")
    time_ids = None
    if conditioned:
        height, width = sizes[0]
        own = (height, width) == (preset.size, preset.size) and preset.time_ids
        time_ids = torch.tensor([preset.time_ids if own else (height, width, 0, 0, height, width)], dtype=torch.float32)
    models = _text_models(weights.folder, conditioned)
    merge_loras(weights.loras, {NETWORK: network, **dict(zip(TEXT_ENCODERS, models, strict=False))})
    _require_text_fit(weights.folder, network, models)
    encoder, names = _text_encoder(weights.folder, models)

    @torch.no_grad()
    def encode(prompts: list[Tensor]) -> list[dict[str, Tensor]]:
        encoded = [encoder(ids) for ids in prompts]
        return [dict(zip(names, outputs if conditioned else (outputs,), strict=True)) for outputs in encoded]

    return Student(
        text_encoder=encoder,
        text_outputs=names,
        encode=encode,
        generator=lambda guidance, empty: FoldedUNet(network, preset.rule, guidance, empty, time_ids, preset.embedded_guidance),
        reference=lambda guidance, empty: GuidedUNet(network, preset.rule, guidance, empty, time_ids, preset.embedded_guidance),
        decoder=load_decoder(weights),
        write_tokenizer=caption_encoder(weights.folder, preset.max_tokens).write_tokenizer,
    )


def caption_encoder(folder: Path, max_tokens: int) -> CaptionEncoder:
    """The CLIP text encoder of SD 1.5 or 2.1; prompts always have 77 tokens."""

    @torch.no_grad()
    def encode(prompts: list[Tensor]) -> list[Tensor]:
        encoder, _ = _text_encoder(folder, _text_models(folder, False))
        return [encoder(ids) for ids in prompts]

    def write_tokenizer(path: Path) -> Text:
        # Both of SDXL's encoders get the ids of the first one's tokenizer.
        embedded = min(config.vocab_size for config in _text_configs(folder))
        return clip_rule(folder / "tokenizer", path, embedded)

    return CaptionEncoder(write_tokenizer, encode)


def _text_kinds() -> dict[str, Any]:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return dict(zip(TEXT_ENCODERS, (CLIPTextModel, CLIPTextModelWithProjection), strict=True))


def _text_models(folder: Path, two: bool) -> list[nn.Module]:
    return [load_module(folder / part, kind) for part, kind in list(_text_kinds().items())[: 1 + two]]


def _text_configs(folder: Path) -> list[Any]:
    paths = {config_path(folder / part): kind for part, kind in _text_kinds().items()}
    first, *second = paths
    return [transformers_config(paths[path], read_config(path, paths[path]), path) for path in (first, *filter(Path.exists, second))]


def _require_text_fit(folder: Path, network: nn.Module, models: list[nn.Module]) -> None:
    """Returns if the text encoders give what the UNet takes, for prompts of 77 tokens; else raises InputError."""
    positions = min(model.config.max_position_embeddings for model in models)
    if positions < CLIP_TOKENS:
        raise InputError(f"the text encoder in {folder} has positions for {positions} tokens, prompts have {CLIP_TOKENS}")
    width, expected = sum(model.config.hidden_size for model in models), network.config.cross_attention_dim
    if width != expected:
        raise InputError(f"the text encoder in {folder} gives states of {width}, the network takes {expected}: fetch both from one model")
    if len(models) > 1:
        width = models[1].config.projection_dim + 6 * network.config.addition_time_embed_dim
        if width != (expected := network.config.projection_class_embeddings_input_dim):
            raise InputError(f"the second text encoder in {folder} and the image's size give {width} numbers, the network takes {expected}")


def _text_encoder(folder: Path, models: list[nn.Module]) -> tuple[nn.Module, tuple[str, ...]]:
    first, *second = models
    if not second:
        return ClipTextEncoder(first), ("states",)
    one, other = (clip_tokenizer(folder / part) for part in ("tokenizer", "tokenizer_2"))
    return SdxlTextEncoder(first, second[0], one.eos_token_id, (one.pad_token_id, other.pad_token_id)), ("states", "pooled")


DENOISER = Denoiser(
    UNet2DConditionModel,
    "unet",
    unet_prediction,
    ("to_q", "to_k", "to_v", "to_out.0"),
    timestep=999,
    masked=False,
    caption_encoder=caption_encoder,
)
