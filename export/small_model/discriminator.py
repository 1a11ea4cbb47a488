"""A discriminator of pictures: heads on Lite1's feature maps (projected GAN, Sauer et al. 2021), and one on the pixels themselves."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from snoopi_rt.export.small_model.features import CHANNELS
from snoopi_rt.export.training.optimise import MasterWeights

WIDTH = 64


class Discriminator(nn.Module):
    """Pictures (B, 3, H, W) and their feature maps, as FeatureMaps(deep=True) has them, to maps of logits: above 0 is real."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            _layers((channels, WIDTH, 3, stride), (WIDTH, WIDTH, 3, 1)) for channels, stride in zip(CHANNELS[1:], (2, 1, 1, 1), strict=True)
        )
        self.pixels = _layers((3, WIDTH // 2, 4, 2), (WIDTH // 2, WIDTH, 4, 2), (WIDTH, WIDTH, 3, 1))

    def forward(self, pictures: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        return [*(head(features) for head, features in zip(self.heads, maps[1:], strict=True)), self.pixels(pictures)]


def _layers(*shapes: tuple[int, int, int, int]) -> nn.Sequential:
    """Convolutions of so many channels, outputs, size and stride, and one to a logit: all of spectral norm 1."""
    layers: list[nn.Module] = []
    for channels, outputs, size, stride in shapes:
        layers += [spectral_norm(nn.Conv2d(channels, outputs, size, stride, padding=1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(shapes[-1][1], 1, 1)))


def hinge(fakes: Sequence[Tensor], reals: Sequence[Tensor]) -> Tensor:
    """The discriminator's loss, a scalar: the mean over its heads."""
    pairs = zip(fakes, reals, strict=True)
    return torch.stack([torch.relu(1 + fake.float()).mean() + torch.relu(1 - real.float()).mean() for fake, real in pairs]).mean()


def fooling(fakes: Sequence[Tensor]) -> Tensor:
    """The loss, a scalar, of what makes the pictures."""
    return -torch.stack([fake.float().mean() for fake in fakes]).mean()


class DiscriminatorWeights(MasterWeights):
    """A discriminator's weights with what else an exact resume needs: the vectors of its spectral norms.

    strength: how much its gradient counts, (1,), which the stage sets.
    """

    def __init__(self, network: Discriminator):
        super().__init__(network, betas=(0.5, 0.95), ema=0.0, clip=math.inf)
        self.strength = torch.zeros(1)
        self._network = network

    def _beside(self) -> dict[str, Tensor]:
        return {"strength": self.strength, **{f"buffer.{name}": value for name, value in self._network.named_buffers()}}

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), **self._beside()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        for name, value in self._beside().items():
            value.copy_(state[name])
