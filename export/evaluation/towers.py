"""OpenCLIP's image and text towers: unit features of images and of texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from snoopi_rt.errors import PackageMissing, how_to_install
from snoopi_rt.export.evaluation.weight_files import loading


@dataclass(frozen=True)
class Architecture:
    """One of open_clip's, by its name there. resize: its "shortest" side and a crop, or HPSv2's "longest" side and black bars.

    changes: to its config, for tests at another size.
    """

    name: str
    resize: Literal["shortest", "longest"] = "shortest"
    changes: tuple[tuple[str, str, Any], ...] = ()


HPS = Architecture("ViT-H-14", "longest")
CLIP_G = Architecture("ViT-g-14")
CLIP_B = Architecture("ViT-B-32")
CMMD = Architecture("ViT-L-14-336-quickgelu")


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise PackageMissing(f"HPSv2 and CLIP need {error.name}: {how_to_install('eval')}") from error
    return open_clip


def build_config(architecture: Architecture) -> dict[str, Any]:
    """What open_clip's constructor takes, with the architecture's changes."""
    config = _open_clip().get_model_config(architecture.name)
    for part, key, value in architecture.changes:
        config[part][key] = value
    return {name: value for name, value in config.items() if name in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")}


def build(architecture: Architecture) -> nn.Module:
    """The network with random weights, in fp32."""
    network = _open_clip().model.CLIP(**build_config(architecture))
    return network.eval().requires_grad_(False)  # type: ignore[no-any-return]


class Towers:
    """A network with the weights of a file: safetensors, or a .pt or .bin that is read as weights only; None: random ones.

    Raises InputError for another network's.
    """

    def __init__(self, architecture: Architecture, weights: Path | None, device: str = "cpu") -> None:
        open_clip = _open_clip()
        network = build(architecture)
        if weights is not None:
            with loading(weights, architecture.name):
                open_clip.load_checkpoint(network, str(weights), strict=True, weights_only=True)
        self.architecture, self._device = architecture, device
        self._network = network.to(device)
        self._tokens = open_clip.get_tokenizer(architecture.name)
        self.preprocess = preprocess(architecture)

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """(N, D) fp32, each of length 1."""
        prepared = torch.stack([self.preprocess(picture) for picture in pictures])
        return _numpy(self._network.encode_image(prepared.to(self._device), normalize=True))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D) fp32, each of length 1. Texts longer than 77 tokens are cut, as open_clip does it."""
        return _numpy(self._network.encode_text(self._tokens(list(texts)).to(self._device), normalize=True))


def preprocess(architecture: Architecture) -> Any:
    """What makes (3, H, W) of an image, by open_clip: HPSv2's networks were fed with their longest side resized and the rest padded."""
    transform = _open_clip().transform
    side = build_config(architecture)["vision_cfg"]["image_size"]
    return transform.image_transform_v2(transform.PreprocessCfg(size=side, resize_mode=architecture.resize), is_train=False)


def _numpy(features: Tensor) -> np.ndarray:
    return np.asarray(features.float().cpu().numpy())
