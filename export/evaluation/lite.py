"""Features of pictures by EfficientNet-Lite: ImageNet's, pooled, as the small domain's judge and `lite2` have them."""

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from snoopi_rt.engines.openvino import import_openvino
from snoopi_rt.errors import PackageMissing, how_to_install
from snoopi_rt.export.evaluation.threads import in_threads
from snoopi_rt.export.evaluation.weight_files import loading
from snoopi_rt.export.small_model.features import load_network, to_network, weights_file

SIDES = {"lite0": 224, "lite2": 260}  # pixels that each network was trained on


class Lite:
    """Pooled features (N, 1280) fp32 of images, resized to what the network was trained on.

    weights: the file to load, by default that of the network's package. Raises InputError for another network's, PackageMissing.
    """

    def __init__(self, name: Literal["lite0", "lite2"], weights: Path | None = None, device: str = "cpu") -> None:
        self.name, self.weights, self.side, self._device = name, weights or weights_file(name), SIDES[name], device
        with loading(self.weights, f"efficientnet-{name}"):
            network = load_network(name, self.weights)
        self._network = network.to(device)

    def __call__(self, pictures: Sequence[Image.Image] | Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """pictures: images in RGB, or (H, W, 3) uint8."""
        batch, streams, pooled = self._pooled
        parts = [pictures[start : start + batch] for start in range(0, len(pictures), batch)]

        def features(part: Sequence[Image.Image] | Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
            levels = torch.from_numpy(np.stack([self._resized(picture) for picture in part])).to(self._device)
            return pooled(to_network(levels.permute(0, 3, 1, 2).float().div(127.5).sub(1)))

        # In threads of our own, so that images are resized while others are in the network.
        rows = in_threads(features, parts, f"features ({self.name})", streams, few=20)
        return np.concatenate(rows) if rows else np.zeros((0, 1280), np.float32)

    @cached_property
    def _pooled(self) -> tuple[int, int, Callable[[Tensor], np.ndarray]]:
        """The batch and the number of threads that serve best, and network inputs (B, 3, side, side) to features (B, 1280)."""
        network = _Pooled(self._network).eval()
        if self._device != "cpu":
            return 64, 1, lambda inputs: torch.no_grad()(network)(inputs).cpu().numpy()
        # A third of eager torch's time, and within 1e-5 of the largest feature.
        try:
            openvino = import_openvino()
        except ImportError as error:
            raise PackageMissing(f"features of images need openvino on the CPU: {how_to_install('eval')}") from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # OpenVINO traces by torch.jit
            model = openvino.convert_model(network, example_input=torch.zeros(1, 3, self.side, self.side))
        # A stream for each thread takes five sixths of the time of one stream on all threads.
        settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "THROUGHPUT"}
        compiled = openvino.Core().compile_model(model, "CPU", settings)

        def pooled(inputs: Tensor) -> np.ndarray:
            features: np.ndarray = compiled.create_infer_request().infer([inputs.contiguous().numpy()])[0]
            return features

        return 2, compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"), pooled

    def _resized(self, picture: Image.Image | np.ndarray) -> np.ndarray:
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        return np.asarray(image.resize((self.side, self.side), Image.Resampling.BICUBIC))


class _Pooled(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.network.extract_features(inputs)
        return features.mean((2, 3))
