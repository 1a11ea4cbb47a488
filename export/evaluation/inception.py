"""Inception-v3's features as FID has them: clean-fid's resizing, torch-fidelity's port of the network of 2015-12-05.

clean-fid's own network is TorchScript, which cannot be read as weights only; torch-fidelity's own resizing is the bilinear one of old
TensorFlow, which aliases (Parmar et al. 2022).
"""

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from snoopi_rt.errors import PackageMissing, how_to_install
from snoopi_rt.export.evaluation.weight_files import loading

SIDE, PROTOCOL_SIDE = 299, 256
DIMENSIONS = 2048


def network_class() -> type[nn.Module]:
    """torch-fidelity's Inception-v3. Raises PackageMissing."""
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except ImportError as error:
        raise PackageMissing(f"Inception features need {error.name}: {how_to_install('eval')}") from error
    return FeatureExtractorInceptionV3  # type: ignore[no-any-return]


class Inception:
    """Features (N, 2048) of images, with the weights of a file that torch-fidelity publishes. Raises InputError for another file."""

    def __init__(self, weights: Path, device: str = "cpu") -> None:
        network = network_class()
        with loading(weights, "torch-fidelity's Inception weights"):
            # Handed over as bytes of our own: it would load the file itself with whatever code is pickled in it.
            checked = io.BytesIO()
            torch.save(torch.load(weights, map_location="cpu", weights_only=True), checked)
            checked.seek(0)
            self._network = network("inception-v3-compat", [str(DIMENSIONS)], checked)
        self._network.to(device)
        self._device = device
        self._prepared = torch.zeros(0)
        # The network takes 8-bit images and resizes them itself: its first layer gets those that are resized as clean-fid does.
        self._network.Conv2d_1a_3x3.register_forward_pre_hook(lambda layer, inputs: (self._prepared,))

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        prepared = torch.from_numpy(np.stack([resized(centre_cropped(picture)) for picture in pictures])).permute(0, 3, 1, 2)
        self._prepared = ((prepared - 128) / 128).to(self._device)
        (features,) = self._network(torch.zeros(len(pictures), 3, SIDE, SIDE, dtype=torch.uint8, device=self._device))
        return np.asarray(features.cpu().numpy())


def centre_cropped(picture: Image.Image) -> Image.Image:
    """The middle square at 256 pixels, by Lanczos, as the COCO protocol has it; an image of that size stays as it is."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return square if side == PROTOCOL_SIDE else square.resize((PROTOCOL_SIDE, PROTOCOL_SIDE), Image.Resampling.LANCZOS)


def resized(picture: Image.Image) -> np.ndarray:
    """(299, 299, 3) fp32 in [0, 255]: bicubic, antialiased, each channel in floats and not rounded, as clean-fid has it."""
    resize = partial(Image.Image.resize, size=(SIDE, SIDE), resample=Image.Resampling.BICUBIC)
    levels = np.asarray(picture, np.float32)
    channels = [np.asarray(resize(Image.fromarray(levels[..., channel]))) for channel in range(3)]
    return np.stack(channels, -1).clip(0, 255)
