"""Shared by the loaders of all backbones: the decoder, and the latents between network and decoder."""

from pathlib import Path
from typing import Any

import torch

from snoopi_rt.bundle.bundle import Latent
from snoopi_rt.errors import InputError
from snoopi_rt.export.backbones import Denoiser, Weights
from snoopi_rt.export.decoder import Decoder
from snoopi_rt.export.weights.checkpoint import config_path, load_module, read_config, without_weights
from snoopi_rt.export.weights.files import CONFIG
from snoopi_rt.export.weights.text_files import read_json
from snoopi_rt.files import check_folder
from snoopi_rt.shell import quote


def check_network(folder: Path, backbone: str, denoiser: Denoiser) -> None:
    """Returns for a diffusers folder with a network of that backbone, by its config; else raises InputError."""
    if not (check_folder(folder) / denoiser.part).is_dir():
        raise InputError(f"{quote(folder)} has no {denoiser.part}: it is not a model of backbone {backbone}")
    read_config(folder / denoiser.part / CONFIG, denoiser.kind)


def load_decoder(weights: Weights) -> Decoder:
    """The decoder of the folder's autoencoder. Raises InputError for an unknown class."""
    folder = weights.decoder or weights.folder / "vae"
    kind, _ = _autoencoder(folder)
    return Decoder(load_module(folder, kind))


def read_latent(weights: Weights, part: str) -> Latent:
    """The latents between the network in the folder `part` and the decoder, by their configs: no weights are read.

    Raises InputError if the two do not fit, or if `weights.decoder` has another scale factor than the weights' own vae.
    """
    own, folder = weights.folder / "vae", weights.decoder or weights.folder / "vae"
    latent = _decoder_latent(folder)
    channels = _network_config(weights, part).get("in_channels", latent.channels)
    if channels != latent.channels:
        raise InputError(
            f"the vae in {folder} takes latents of {latent.channels} channels, the network gives {channels}: "
            "choose the one that it was trained with"
        )
    if folder != own and (own / CONFIG).is_file() and (own_factor := _decoder_latent(own).factor) != latent.factor:
        raise InputError(f"the vae in {folder} has a scale factor of {latent.factor}, the weights' own has {own_factor}")
    return latent


def own_side(weights: Weights, part: str) -> int | None:
    """The sample size of the network in latent pixels; None if its config has none, or two."""
    side = _network_config(weights, part).get("sample_size")
    return side if type(side) is int and side > 0 else None


def _network_config(weights: Weights, part: str) -> dict[str, Any]:
    return read_json(config_path(weights.folder / part, weights.network))


@torch.no_grad()
def _decoder_latent(folder: Path) -> Latent:
    """The latents that the decoder takes, found by running it on the meta device."""
    kind, config = _autoencoder(folder)
    side = 8
    with torch.device("meta"):
        vae = without_weights(kind, config, folder / CONFIG)
        channels = vae.config.latent_channels
        _, colours, height, width = Decoder(vae).pixels(torch.empty(1, channels, side, side)).shape
    if colours != 3 or height != width or height % side:
        raise InputError(f"the vae in {folder} makes {width}x{height} pixels in {colours} channels of {side}x{side} latent pixels")
    return Latent(channels, height // side)


def _autoencoder(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The class and the config of the autoencoder in the folder."""
    from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

    from snoopi_rt.export.small_model.networks import PixelShuffleDecoder, WideDecoder

    kinds = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderDC, AutoencoderTiny, PixelShuffleDecoder, WideDecoder)}
    config = read_json(folder / CONFIG)
    name = str(config.get("_class_name"))
    if name not in kinds:
        raise InputError(f"the vae in {folder} is {name}, supported are {', '.join(kinds)}")
    return kinds[name], config
