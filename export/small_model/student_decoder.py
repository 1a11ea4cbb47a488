"""The last stage of the small model: a light decoder that restores what the latents of a student lack.

It learns from pictures that are known, whose latents the teacher has drawn again and so has given the faults of its own drawings
(`redrawn`), and, with a discriminator, from what the student draws, where no picture is known. A decoder that only imitates another on the
student's latents can draw no better than that one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from snoopi_rt.errors import InputError
from snoopi_rt.export.device import default_device
from snoopi_rt.export.small_model.dataset.build import DATASET, TrainingSet
from snoopi_rt.export.small_model.decoder import real_pictures
from snoopi_rt.export.small_model.discriminator import Discriminator, DiscriminatorWeights, fooling, hinge
from snoopi_rt.export.small_model.features import FeatureMaps
from snoopi_rt.export.small_model.networks import HIGH, PixelShuffleDecoder, WideDecoder, to_pictures
from snoopi_rt.export.small_model.redrawn import ENCODED, STUDENT, TWICE, redrawn
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.optimise import MasterWeights, learning_rate
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.files import WEIGHTS, fingerprint, require, save_diffusers
from snoopi_rt.files import check_folder
from snoopi_rt.request import integer

SIDE = 256  # pixels
WINDOW = 128  # pixels of a picture that are compared at once
SHOWN = 8  # pictures in a row of samples
SHARES = torch.tensor([0.3, 0.4, 0.3])
"""How often latents are the encoder's, the teacher's in one call, and in two."""
OWN = 4
"""One image in so many is the student's own, once there is a discriminator."""
MAPS = (0.5, 0.5, 0.5, 0.4, 0.4)
"""Weights of the distances of feature maps."""
FIRST, FIRST_MAPS = 0.2, 0.1
"""For the first share of a new decoder's steps they are multiplied by the second number: colours come first."""
COARSE = 8  # pixels: in means over so many the student's own images must look as the teacher's decoder shows them
WEIGHED_EVERY = 50  # steps after which the discriminator's strength is measured again
RAMP = 100  # steps in which the discriminator comes in
JUDGE_LR = 3e-4  # the discriminator's learning rate
FORM = torch.channels_last


@dataclass(frozen=True)
class StudentDecoderRecipe(loop.StageRecipe):
    """The settings of this stage. Raises InputError for values out of range."""

    steps: int = 7000
    batch: int = 16
    lr: float = 1e-3
    noise: float = 0.06
    """Largest deviation of the noise added to the encoder's latents."""
    images: int = 12288
    """Images of the set to train on."""
    adversarial: float = 0.8
    """The norm of the discriminator's gradient in the pictures, as a share of that of all other losses; 0 is no discriminator."""
    adversarial_from: float = 0.25
    """The share of the steps after which the discriminator begins."""

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("images", self.images, 1)
        for name, last in (("noise", math.inf), ("adversarial", math.inf), ("adversarial_from", 1.0)):
            if not 0 <= getattr(self, name) <= last or math.isinf(getattr(self, name)):
                raise InputError(f"{name} is out of range: {getattr(self, name)}")


def distance(drawn: Tensor, real: Tensor, maps: Sequence[Tensor], real_maps: Sequence[Tensor], weight: float) -> tuple[Tensor, Tensor]:
    """The loss of pictures (B, 3, H, W) that should be others, by their pixels and feature maps, and the L1 distance alone; scalars."""
    error = drawn.float() - real.float()
    features = torch.stack([share * (a - b).float().abs().mean() for share, a, b in zip(MAPS, maps, real_maps, strict=True)]).sum()
    return error.abs().mean() + error.square().mean() + weight * features, error.abs().mean()


def train(
    student: Path, teacher: Path, data: Path, out: Path, recipe: StudentDecoderRecipe, compiled: bool = False, start: Path | None = None
) -> None:
    """Trains a WideDecoder for a student on a set's pictures, and writes it to `out` in fp16.

    start: a decoder to train further; None begins with a new one. Raises InputError for fewer images than recipe.images,
    and as loop.run does.
    """
    vae = require(check_folder(teacher) / "vae", "train teacher")
    files = {
        "student": require(check_folder(student) / "transformer", "train student") / WEIGHTS,
        "teacher": require(teacher / "transformer", "train teacher") / WEIGHTS,
        "decoder": vae / WEIGHTS,
    }
    torch.manual_seed(recipe.seed)
    model = WideDecoder() if start is None else load_module(check_folder(start), WideDecoder).requires_grad_(True)
    if start is not None:
        files["start"] = start / WEIGHTS
    images = TrainingSet(data, device=default_device())
    if len(images) < recipe.images:
        raise InputError(f"{data} has {len(images)} images, fewer than {recipe.images}: --set images={len(images)} takes them")
    inputs = {name: fingerprint(path) for name, path in {**files, "data": data / DATASET}.items()}
    stage = loop.Stage("student decoder", out, recipe, inputs, sample_every=500)
    loop.first_step(stage)
    features = FeatureMaps(deep=True)  # whose package may be missing: before anything is drawn
    made_by = [inputs[name] for name in ("student", "teacher", "data")]
    latents = redrawn(images, teacher, student, recipe.images, recipe.seed, out / "latents", made_by)
    pictures = real_pictures(data, recipe.images, out)
    training = _Training(model, recipe, latents, pictures, features, load_module(vae, PixelShuffleDecoder), compiled, start is None)
    loop.run(stage, {"decoder": training.weights, "discriminator": training.judged}, training.step, training.sample)
    save_diffusers(training.averaged(), out)


@dataclass(frozen=True)
class _Batch:
    """Latents (B, 8, 16, 16), of which the first are of known pictures; where their windows are; and those of the known pictures."""

    latents: Tensor
    corners: list[list[int]]
    real: Tensor


class _Training:
    """The decoder, its discriminator, and what they learn from.

    latents: as `redrawn` gives them, of pictures (N, SIDE, SIDE, 3) uint8. coarse: shows what the student's own images should look like
    in the mean.
    """

    def __init__(
        self,
        model: WideDecoder,
        recipe: StudentDecoderRecipe,
        latents: Tensor,
        pictures: np.ndarray,
        features: FeatureMaps,
        coarse: PixelShuffleDecoder,
        compiled: bool,
        new: bool,
    ):
        self.recipe, self.latents, self.pictures, self.device = recipe, latents, pictures, default_device()
        self.model, self.discriminator = model.to(self.device), Discriminator().to(self.device)
        self.weights, self.judged = MasterWeights(self.model, ema=0.995, muon=True), DiscriminatorWeights(self.discriminator)
        for network in (self.model, self.discriminator, features, coarse):
            network.bfloat16().to(self.device, memory_format=FORM)
        if compiled:
            torch._functorch.config.donated_buffer = False  # `_strength` takes gradients twice, which compiled layers refuse otherwise
            self.model.decoder.low.compile()
            self.model.decoder.high.compile()
        self.coarse, self.maps = coarse, torch.compile(features) if compiled else features
        self.colours_until = FIRST * recipe.steps if new else 0.0
        self.begins = math.ceil(recipe.adversarial_from * recipe.steps) if recipe.adversarial else recipe.steps

    def step(self, i: int, random: torch.Generator) -> dict[str, float]:
        adversarial = i >= self.begins
        batch = self._batch(self.recipe.batch // OWN if adversarial else 0, random)
        known = len(batch.real)
        drawn = self.model.decoder.windows(batch.latents, batch.corners, WINDOW // HIGH).contiguous(memory_format=FORM)
        maps = self.maps(drawn)
        with torch.no_grad():
            real_maps = self.maps(batch.real)
        weight = FIRST_MAPS if i < self.colours_until else 1.0
        loss, l1 = distance(drawn[:known], batch.real, [part[:known] for part in maps], real_maps, weight)
        scalars = {"loss": loss.item(), "l1": l1.item()}
        if adversarial:
            if len(drawn) > known:
                loss = loss + OWN * (len(drawn) - known) / known * self._coarse_distance(drawn[known:], batch)
            self.discriminator.requires_grad_(False)
            fooled = fooling(self.discriminator(drawn, maps))
            scalars["fooled"] = fooled.item()
            loss = loss + min(1.0, (i - self.begins) / RAMP) * self._strength(i, loss, fooled, drawn) * fooled
        loss.backward()
        scalars["norm"] = self.weights.step(learning_rate(self.recipe.lr, i, self.recipe.steps, decay_from=0.5))
        if adversarial:
            self.discriminator.requires_grad_(True)
            fakes = self.discriminator(drawn.detach(), [part.detach() for part in maps])
            judged = hinge(fakes, self.discriminator(batch.real, real_maps))
            judged.backward()
            self.judged.step(JUDGE_LR)
            scalars["judged"] = judged.item()
        return scalars

    def averaged(self) -> WideDecoder:
        return self.weights.averaged(WideDecoder(**self.model.config))

    def sample(self, path: Path) -> None:
        """Writes a grid: pictures, and what the decoder makes of latents by the encoder, by the teacher and by the student."""
        drawn = self.averaged()
        rows = [self.pictures[:SHOWN], *(to_pictures(drawn, self.latents[kind, :SHOWN]) for kind in (ENCODED, TWICE, STUDENT))]
        Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in rows], 0)).save(path)

    def _batch(self, own: int, random: torch.Generator) -> _Batch:
        """A batch with so many of the student's own images, at its end."""
        size, known = self.recipe.batch, self.recipe.batch - own
        numbers = torch.randint(self.recipe.images, (size,), generator=random)
        kinds = torch.cat([torch.multinomial(SHARES, known, replacement=True, generator=random), torch.full((own,), STUDENT)])
        # Windows that would begin outside are moved to the edge, so that edges are seen as often as the rest.
        places = torch.rand(size, 2, generator=random).mul(1.2).sub(0.1).clamp(0, 1)
        corners = (places * ((SIDE - WINDOW) // HIGH)).round().long().tolist()
        latents = self.latents[kinds, numbers].float()
        noise = self.recipe.noise * torch.rand(size, 1, 1, 1, generator=random) * torch.randn(latents.shape, generator=random)
        latents += (kinds == ENCODED)[:, None, None, None] * noise
        real = np.stack([self.pictures[number] for number in numbers[:known].tolist()])
        windows = _cut(torch.from_numpy(real).permute(0, 3, 1, 2), corners[:known]).float().div(127.5).sub(1)
        return _Batch(self._placed(latents), corners, self._placed(windows))

    def _placed(self, array: Tensor) -> Tensor:
        return array.to(self.device, torch.bfloat16).contiguous(memory_format=FORM)

    def _coarse_distance(self, drawn: Tensor, batch: _Batch) -> Tensor:
        known = len(batch.real)
        with torch.no_grad():
            wanted = _cut(self.coarse.decoder(batch.latents[known:]), batch.corners[known:])
        return (avg_pool2d(drawn.float(), COARSE) - avg_pool2d(wanted.float(), COARSE)).abs().mean()

    def _strength(self, i: int, loss: Tensor, fooled: Tensor, drawn: Tensor) -> float:
        """What the discriminator's loss counts, so that its gradient in the pictures is the recipe's share of all others'."""
        if (i - self.begins) % WEIGHED_EVERY == 0:
            norms = [torch.autograd.grad(part, drawn, retain_graph=True)[0].float().norm() for part in (loss, fooled)]
            self.judged.strength.fill_(self.recipe.adversarial * (norms[0] / norms[1].clamp(min=1e-9)).item())
        return self.judged.strength.item()


def _cut(pictures: Tensor, corners: list[list[int]]) -> Tensor:
    """Windows (B, 3, WINDOW, WINDOW) of pictures (B, 3, SIDE, SIDE), at these places in steps of HIGH pixels."""
    places = ((HIGH * y, HIGH * x) for y, x in corners)
    return torch.stack([picture[:, y : y + WINDOW, x : x + WINDOW] for picture, (y, x) in zip(pictures, places, strict=True)])
