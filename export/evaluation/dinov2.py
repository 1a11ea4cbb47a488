"""DINOv2's features, as the Frechet distance in them has it (Stein et al. 2023): ViT-L/14's class token at 224 pixels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from snoopi_rt.export.evaluation.weight_files import loading

SIDE = 224
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
CONFIG = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518, "patch_size": 14}


class Dinov2:
    """Features (N, 1024) of images, with the weights of facebook/dinov2-large. Raises InputError for another file."""

    def __init__(self, weights: Path, device: str = "cpu") -> None:
        with loading(weights, "dinov2-large"):
            state = load_file(weights)
            # As many layers as the file has: a test's has fewer.
            layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layer."))
            self._network = Dinov2Model(Dinov2Config(**{**CONFIG, "num_hidden_layers": layers})).eval().requires_grad_(False)
            self._network.load_state_dict(state)
        self._device = device
        self._network.to(device)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        prepared = torch.from_numpy(np.stack([_prepared(picture) for picture in pictures])).permute(0, 3, 1, 2)
        return np.asarray(self._network(prepared.to(self._device)).pooler_output.float().cpu().numpy())


def _prepared(picture: Image.Image) -> np.ndarray:
    levels = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / 255
    return (levels - MEAN) / DEVIATION
