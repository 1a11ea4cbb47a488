"""Scorers that tell which thing a picture shows, and whose features picture sets are compared in.

Two, so that they can disagree: `drawings` is trained on drawings of the same things that no student ever saw (Twemoji, EmojiOne), so
that it knows the things and not the student's training pictures; `pictures` is another network, trained on the student's own drawings.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from snoopi_rt.export.training.optimise import learning_rate
from snoopi_rt.export.training.small.concepts import CONCEPTS
from snoopi_rt.export.training.small.emoji import BACKGROUNDS, DRAWINGS, FLAWED, QUALITIES, Drawing, Facts, draw, fetch_sprites
from snoopi_rt.export.weights.files import save_tensors

UNSEEN = (
    Drawing("@iconify-json/twemoji", "1.2.5", "simple icon", "CC BY 4.0", "github.com/jdecked/twemoji, (c) Twitter and contributors"),
    Drawing("@iconify-json/emojione", "1.2.3", "clip art", "CC BY 4.0", "EmojiOne 2, github.com/EmojiTwo/emojitwo"),
)
SIDE = 64  # pixels that a scorer sees
NAMES = tuple(concept.name for concept in CONCEPTS)
Sprites = dict[tuple[str, str], Image.Image]


@dataclass(frozen=True)
class Kind:
    """One scorer: what it learns from and how its network is built."""

    name: str
    drawings: tuple[Drawing, ...]
    widths: tuple[int, ...]
    depth: int
    seed: int


KINDS = (Kind("drawings", UNSEEN, (32, 64, 128, 192), 2, 1), Kind("pictures", DRAWINGS, (24, 48, 96, 160), 3, 2))
STEPS, BATCH = 3000, 64


class Network(nn.Module):
    """Pictures (B, 3, 64, 64) in [-1, 1] to features (B, D) and scores (B, things): a residual network."""

    def __init__(self, widths: tuple[int, ...], depth: int):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.stages = nn.ModuleList()
        for before, width in zip((widths[0], *widths), widths, strict=False):
            blocks = [nn.Conv2d(before, width, 3, stride=2, padding=1), *(Block(width) for _ in range(depth))]
            self.stages.append(nn.Sequential(*blocks))
        self.last = nn.Linear(widths[-1], len(NAMES))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.stem(pictures)
        for stage in self.stages:
            hidden = stage(hidden)
        features = F.relu(hidden).mean((2, 3))
        return features, self.last(features)


class Block(nn.Module):
    """Two convolutions with normalisation before each, added to what comes in."""

    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            hidden = conv(F.relu(norm(hidden)))
        return x + hidden


class Scorer:
    """A trained network. Raises what open_scorer raises."""

    def __init__(self, kind: Kind, network: Network):
        self.kind, self.network = kind, network.eval()

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The features (N, D) and the number of the thing (N,) of pictures (N, H, W, 3) uint8."""
        features, things = [], []
        for start in range(0, len(pictures), 256):
            found, scores = self.network(_seen(pictures[start : start + 256]))
            features.append(found.double().numpy())
            things.append(scores.argmax(1).numpy())
        return np.concatenate(features), np.concatenate(things)

    def right(self, pictures: np.ndarray, names: list[str]) -> np.ndarray:
        """Whether each picture shows what its name says, (N,) bool."""
        return self(pictures)[1] == np.array([NAMES.index(name) for name in names])


def scorer_file(kind: Kind, folder: Path, steps: int = STEPS) -> Path:
    """Where a scorer trained for so many steps is kept."""
    return folder / f"scorer-{kind.name}-{steps}.safetensors"


def open_scorer(kind: Kind, folder: Path, drawings: Path, steps: int = STEPS) -> Scorer:
    """The scorer, trained first (10 to 20 minutes) unless `folder` has it; its drawings are then fetched to `drawings`.

    Raises what fetch_sprites raises.
    """
    file, network = scorer_file(kind, folder, steps), Network(kind.widths, kind.depth)
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        trained = train(kind, fetch_sprites(drawings, kind.drawings, share=0.5), steps)
        save_tensors(file, {name: value.half() for name, value in trained.state_dict().items()})
    with safe_open(file, framework="pt") as stored:
        network.load_state_dict({key: stored.get_tensor(key) for key in stored.keys()})  # noqa: SIM118 - safe_open is not a dict
    return Scorer(kind, network)


def train(kind: Kind, sprites: Sprites, steps: int = STEPS) -> Network:
    """A network that tells the things of the sprites, by (thing, style), from one another, however they are turned, coloured and flawed."""
    torch.manual_seed(kind.seed)
    random, rng = torch.Generator().manual_seed(kind.seed), np.random.default_rng(kind.seed)
    network = Network(kind.widths, kind.depth).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=0.05)
    with tqdm(range(steps), desc=f"scorer {kind.name}", unit="step") as bar:
        for step in bar:
            pictures, things = examples(sprites, BATCH, rng)
            seen = _varied(_seen(pictures), random).to(memory_format=torch.channels_last)
            loss = F.cross_entropy(network(seen)[1], torch.from_numpy(things), label_smoothing=0.1)
            optimiser.param_groups[0]["lr"] = learning_rate(2e-3, step, steps, decay_from=0.3)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return network


def examples(sprites: Sprites, count: int, rng: np.random.Generator, flawed: float = FLAWED) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 128, 128, 3) uint8 as the training set has them, and the numbers (N,) of their things."""
    keys, pictures, things = list(sprites), [], []
    for _ in range(count):
        name, style = keys[rng.integers(len(keys))]
        background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        quality = QUALITIES[rng.integers(len(QUALITIES))] if rng.random() < flawed else None
        pictures.append(draw([sprites[name, style]], Facts(name, name, style, background, quality), rng))
        things.append(NAMES.index(name))
    return np.stack(pictures), np.array(things)


def _seen(pictures: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) to (N, 3, 64, 64) in [-1, 1]."""
    values = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.interpolate(values, (SIDE, SIDE), mode="area")


def _varied(pictures: Tensor, random: torch.Generator) -> Tensor:
    """Turned, scaled, mirrored, and with other colours: what one drawing of a thing differs in from another."""
    count = len(pictures)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=random)

    angle, scale, mirror = uniform(-0.3, 0.3), uniform(0.85, 1.3), torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    stretch, shift = uniform(0.85, 1.15), torch.stack([uniform(-0.15, 0.15), uniform(-0.15, 0.15)], 1)
    matrix = torch.stack(
        [
            torch.stack([angle.cos() * mirror * scale, -angle.sin() * scale], 1),
            torch.stack([angle.sin() * mirror, angle.cos()], 1) * (scale * stretch)[:, None],
        ],
        1,
    )
    grid = F.affine_grid(torch.cat([matrix, shift[..., None]], 2), list(pictures.shape), align_corners=False)
    turned = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    gain, offset = 1 + 0.25 * torch.randn(count, 3, 1, 1, generator=random), 0.15 * torch.randn(count, 3, 1, 1, generator=random)
    gray = turned.mean(1, keepdim=True)
    return (gray + (turned - gray) * uniform(0.4, 1.4).view(-1, 1, 1, 1)) * gain + offset
