"""A small teacher of SD3's kind, and its one-step student, for joint_negatives.py.

By v-prediction the teacher learns the small pictures, and the student the teacher's of the same noise.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from tqdm import tqdm

from snoopi_rt.export.evaluation.statistics import spread
from snoopi_rt.export.small_model.dataset.build import TrainingSet, read_samples
from snoopi_rt.export.small_model.dataset.vocabulary import things
from snoopi_rt.export.small_model.networks import PixelShuffleDecoder, scheduler, to_pictures
from snoopi_rt.export.small_model.teacher import FORMER_NAMES, SAMPLE_PROMPTS
from snoopi_rt.export.text.minilm import encode
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.image_grid import image_grid
from snoopi_rt.export.training.optimise import MasterWeights, learning_rate
from snoopi_rt.export.training.sampling import sample_ddim
from snoopi_rt.export.training.schedule import Schedule
from snoopi_rt.export.training.stage_recipe import StageRecipe
from snoopi_rt.export.training.teacher_pictures import TeacherPictures
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.files import WEIGHTS, fingerprint

TOKENS = 24  # of every text: SD3 has no mask, so that all must be equally long
SHAPE = (8, 16, 16)
LAST = 999  # where the noise is pure, and the student is called
SCHEDULE = Schedule.from_scheduler(scheduler())


@dataclass(frozen=True)
class Recipe(StageRecipe):
    """Of either network."""

    steps: int = 3500
    batch: int = 128
    lr: float = 1e-3
    things: int = 64
    """So many of the common things are learned: a sixth of the domain's, which so short a training can learn well."""
    prompt_dropout: float = 0.1
    """Share of captions replaced by the empty prompt."""
    pairs: int = 10_240
    """Pictures of the teacher that the student learns."""
    teacher_steps: int = 10
    guidance_scale: float = 2.25


@dataclass(frozen=True)
class Text:
    """Token states (B, T, 384) bf16 and their mean (B, 384), which SD3's blocks are modulated with."""

    states: Tensor
    pooled: Tensor

    @classmethod
    def of(cls, states: Tensor, mask: Tensor) -> "Text":
        """Of states and their mask (B, T), padded or cut to TOKENS."""
        states, mask = (nn.functional.pad(x[:, :TOKENS], (0, 0) * (x.ndim - 2) + (0, max(0, TOKENS - x.shape[1]))) for x in (states, mask))
        states = states.bfloat16() * mask[..., None].bfloat16()
        return cls(states, states.sum(1) / mask.bfloat16().sum(1, keepdim=True))

    @classmethod
    def encode(cls, prompts: Sequence[str]) -> "Text":
        states, lengths = encode(list(prompts))
        return cls.of(states, torch.arange(states.shape[1]) < lengths[:, None])


def joint_transformer() -> SD3Transformer2DModel:
    """SD3's transformer in 6 layers of width 192, 7.6 M parameters."""
    network = SD3Transformer2DModel(
        sample_size=SHAPE[1],
        patch_size=2,
        in_channels=SHAPE[0],
        out_channels=SHAPE[0],
        num_layers=6,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=384,
        caption_projection_dim=192,
        pooled_projection_dim=384,
        pos_embed_max_size=SHAPE[1] // 2,
        qk_norm="rms_norm",
    )
    nn.init.zeros_(network.proj_out.weight)
    # It is added to the timestep's bias: one says as much, and torch.compile 2.13 stores two equal gradients under one name in its C++.
    network.time_text_embed.text_embedder.linear_2.bias = None
    return network


def v_prediction(network: nn.Module, x_t: Tensor, t: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
    """The predicted v (B, 8, 16, 16) fp32."""
    return network(x_t.bfloat16(), encoder_hidden_states=states, pooled_projections=pooled, timestep=t, return_dict=False)[0].float()


def loss(network: nn.Module, x_t: Tensor, t: Tensor, states: Tensor, pooled: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of the predicted v."""
    return (v_prediction(network, x_t, t, states, pooled) - target).square().mean()


def in_one_step(network: nn.Module, noise: Tensor, text: Text) -> Tensor:
    """Clean latents of noise: at the last timestep v = -x0."""
    return -v_prediction(network, noise, torch.full((len(noise),), LAST), text.states, text.pooled)


def in_many_steps(network: nn.Module, noise: Tensor, text: Text, steps: int, guidance_scale: float) -> Tensor:
    """Clean latents of noise by DDIM with classifier-free guidance."""
    empty = Text.encode([""])
    states = torch.cat([text.states, empty.states.expand(len(noise), -1, -1)])
    pooled = torch.cat([text.pooled, empty.pooled.expand(len(noise), -1)])

    def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        both, times = torch.cat([x_t, x_t]), torch.cat([t, t])
        conditional, unconditional = v_prediction(network, both, times, states, pooled).chunk(2)
        return conditional, unconditional

    return sample_ddim(SCHEDULE, predict, noise, steps, guidance_scale)


@dataclass(frozen=True)
class Pictures:
    """The pictures of a set that show the recipe's things: their rows in the set, those of two things as often as in the whole set."""

    set: TrainingSet
    things: list[str]
    rows: Tensor

    @classmethod
    def of(cls, data: Path, count: int) -> "Pictures":
        """Of a folder that `snoopi-rt data emoji` wrote, and so many things."""
        common = [thing.name for thing in things() if thing.common]
        names = spread(common, count)
        scenes = [sample.scene for sample in read_samples(data)]
        times = [(len(common) // len(names)) ** (len(scene.things) - 1) if set(scene.things) <= set(names) else 0 for scene in scenes]
        return cls(TrainingSet(data, longest=TOKENS), names, torch.arange(len(scenes)).repeat_interleave(torch.tensor(times)))

    def captions(self, rows: Tensor, empty: Tensor | None = None) -> Text:
        """Of rows of the set; the empty prompt if `empty`."""
        return Text.of(*self.set.captions(rows, torch.zeros(len(rows), dtype=torch.bool) if empty is None else empty))


class Stage:
    """The training of one network, and what both have in common."""

    def __init__(self, name: str, folder: Path, recipe: Recipe, data: Path, decoder: Path, start: nn.Module | None = None):
        torch.manual_seed(recipe.seed)
        self.network = joint_transformer()
        if start is not None:
            self.network.load_state_dict(start.state_dict())
        self.weights = MasterWeights(self.network, ema=0.9995, muon=True)
        self.network.bfloat16()
        self.recipe, self.decoder = recipe, load_module(decoder, PixelShuffleDecoder)
        inputs = {"data": fingerprint(data / "dataset.json"), "decoder": fingerprint(decoder / WEIGHTS)}
        self._stage = loop.Stage(name, folder, recipe, inputs, former_names=FORMER_NAMES)
        self._loss = torch.compile(loss)

    def run(self, batch_of: Any, draw: Any) -> nn.Module:
        """Trains on the x_t, t, text and target that batch_of(i, random) gives; the moving average. draw(network, noise, text): latents."""

        def step(i: int, random: torch.Generator) -> dict[str, float]:
            x_t, t, text, target = batch_of(i, random)
            value = self._loss(self.network, x_t, t, text.states, text.pooled, target)
            value.backward()
            norm = self.weights.step(learning_rate(self.recipe.lr, i, self.recipe.steps))
            return {"loss": value.item(), "norm": norm}

        @torch.no_grad()
        def sample(path: Path) -> None:
            noise = torch.randn(len(SAMPLE_PROMPTS), *SHAPE, generator=torch.Generator().manual_seed(0))
            latents = draw(self.averaged(), noise, Text.encode(SAMPLE_PROMPTS))
            image_grid(to_pictures(self.decoder, latents), list(SAMPLE_PROMPTS)).save(path)

        loop.run(self._stage, {"network": self.weights}, step, sample)
        return self.averaged()

    def averaged(self) -> nn.Module:
        return self.weights.averaged(joint_transformer()).bfloat16()


def train_teacher(folder: Path, recipe: Recipe, data: Path, decoder: Path, pictures: Pictures) -> nn.Module:
    def batch_of(i: int, random: torch.Generator) -> tuple[Tensor, Tensor, Text, Tensor]:
        rows = pictures.rows[torch.randint(len(pictures.rows), (recipe.batch,), generator=random)]
        text = pictures.captions(rows, torch.rand(recipe.batch, generator=random) < recipe.prompt_dropout)
        latents, t = pictures.set.latents[rows].float(), torch.randint(1000, (recipe.batch,), generator=random)
        noise = torch.randn(latents.shape, generator=random)
        return SCHEDULE.noised(latents, noise, t), t, text, SCHEDULE.target(latents, noise, t)

    def draw(network: nn.Module, noise: Tensor, text: Text) -> Tensor:
        return in_many_steps(network, noise, text, recipe.teacher_steps, recipe.guidance_scale)

    return Stage("teacher", folder, recipe, data, decoder).run(batch_of, draw)


def train_student(
    folder: Path, recipe: Recipe, data: Path, decoder: Path, pictures: Pictures, teacher: nn.Module, teacher_hash: str
) -> nn.Module:
    rows = pictures.rows[torch.randperm(len(pictures.rows), generator=torch.Generator().manual_seed(recipe.seed))]

    def noise_of(pairs: Iterable[int]) -> Tensor:
        return torch.stack([torch.randn(SHAPE, generator=loop.random_stream(recipe.seed, "pair", pair)) for pair in pairs])

    def text_of(pairs: Sequence[int]) -> Text:
        return pictures.captions(rows[torch.tensor(pairs) % len(rows)])

    @torch.no_grad()
    def draw_pairs(pairs: Sequence[int]) -> Tensor:
        return in_many_steps(teacher, noise_of(pairs), text_of(pairs), recipe.teacher_steps, recipe.guidance_scale)

    drawn = TeacherPictures(folder / "pictures", teacher_hash[:16], recipe.pairs, SHAPE, draw_pairs)
    for start in tqdm(range(0, recipe.pairs, recipe.batch), desc="teacher's pictures", unit="batch"):
        drawn.latents(list(range(start, min(start + recipe.batch, recipe.pairs))))

    def batch_of(i: int, random: torch.Generator) -> tuple[Tensor, Tensor, Text, Tensor]:
        pairs = torch.randint(recipe.pairs, (recipe.batch,), generator=random).tolist()
        return noise_of(pairs), torch.full((len(pairs),), LAST), text_of(pairs), -drawn.latents(pairs)

    return Stage("student", folder, recipe, data, decoder, teacher).run(batch_of, in_one_step)
