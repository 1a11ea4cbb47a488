"""What the loaders of public checkpoints share: the network with its LoRAs, and the decoder."""

import json

from torch import nn

from snoopi_rt.engines.base import InputError
from snoopi_rt.export.backbones import Weights
from snoopi_rt.export.decoder import Decoder
from snoopi_rt.export.presets.preset import Preset
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.files import CONFIG
from snoopi_rt.export.weights.lora import merge_lora


def load_network(weights: Weights, kind: type, part: str) -> nn.Module:
    """The transformer or UNet, LoRAs merged. Raises InputError as load_module and merge_lora do."""
    network = load_module(weights.folder / part, kind, weights.network)
    for file, strength in weights.loras:
        merge_lora(network, file, strength)
    return network


def load_decoder(weights: Weights, preset: Preset) -> Decoder:
    """The decoder of whichever autoencoder the folder holds. Raises InputError for another one and for a scale other than the preset's."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    folder = weights.decoder or weights.folder / "vae"
    try:
        name = json.loads((folder / CONFIG).read_text()).get("_class_name")
    except (OSError, ValueError) as error:
        raise InputError(f"no {CONFIG} of a vae in {folder}") from error
    if name not in kinds:
        raise InputError(f"the vae in {folder} is {name}, supported are {', '.join(kinds)}")
    vae = load_module(folder, kinds[name])
    scale = vae.config.scaling_factor
    if name == "AutoencoderKL" and abs(scale - preset.vae_scaling) > 1e-5:
        raise InputError(
            f"the vae in {folder} has scaling_factor {scale}, preset {preset.name} says {preset.vae_scaling}: --set vae_scaling={scale}"
        )
    return Decoder(vae)
