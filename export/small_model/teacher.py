"""The teacher stage: a small PixArt transformer trained by v-prediction on latents, with zero terminal SNR and 10 % empty captions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from snoopi_rt.errors import InputError
from snoopi_rt.export.attention import PlainAttention
from snoopi_rt.export.device import default_device
from snoopi_rt.export.small_model.dataset.build import TrainingSet
from snoopi_rt.export.small_model.networks import LAYERS, PixelShuffleDecoder, deepened, scheduler, to_pictures, transformer
from snoopi_rt.export.text.minilm import encode
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.image_grid import image_grid
from snoopi_rt.export.training.optimise import MasterWeights, learning_rate
from snoopi_rt.export.training.sampling import sample_ddim
from snoopi_rt.export.training.schedule import Schedule
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.files import WEIGHTS, fingerprint, require, save_diffusers
from snoopi_rt.files import check_folder
from snoopi_rt.kernels import attention, fused_attention
from snoopi_rt.request import integer

SAMPLE_PROMPTS = (
    "a cat",
    "a robot",
    "a castle on a blue background",
    "two apples",
    "a blue car",
    "a cat and a dog",
    "a smiley",
    "a horse on a green background",
    "a ghost on a purple background",
    "a dragon",
    "three hearts",
    "a pirate ship",
    "an astronaut on a black background",
    "a blurry panda on an orange background",
    "a 3d render of a crown",
    "a flat drawing of a fish",
    "a pink elephant",
    "a bee above a flower",
    "a hamburger on a red background",
    "a guitar, grayscale",
    "a pixelated rose",
    "a grainy banana on a blue background",
    "a small house",
    "sunset",
)


@dataclass(frozen=True)
class TeacherRecipe(loop.StageRecipe):
    """The settings of this stage. Raises InputError for values out of range."""

    steps: int = 7_500
    batch: int = 128
    lr: float = 1e-3
    prompt_dropout: float = 0.1
    """Share of captions replaced by the empty prompt, for classifier-free guidance."""
    two_things: float = 2.0
    """How much more often than the set holds them images of two things are drawn: their errors are the largest and fall the slowest."""
    muon: bool = True
    """Step matrices by Muon, and all other parameters by AdamW."""
    layers: int = LAYERS
    """Transformer blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("layers", self.layers, 1)
        if not 0 <= self.prompt_dropout <= 1:
            raise InputError(f"prompt_dropout must lie between 0 and 1, got {self.prompt_dropout}")
        if not 0 < self.two_things < math.inf:
            raise InputError(f"two_things must be a finite number above 0, got {self.two_things}")


FORMER_NAMES = {"empty": "prompt_dropout"}
"""As in training/recipes.py."""


def loss(model: PixArtTransformer2DModel, x_t: Tensor, target: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of the predicted v, a scalar; x_t and target (B, 8, 16, 16), t (B,), states (B, T, 384), mask (B, T)."""
    v = model(x_t, encoder_hidden_states=states, timestep=t, encoder_attention_mask=mask, return_dict=False)[0]
    return (v.float() - target).square().mean()


@torch.no_grad()
def draw(model: PixArtTransformer2DModel, prompts: Sequence[str], noise: Tensor, steps: int = 10, guidance_scale: float = 2.0) -> Tensor:
    """Clean latents (B, 8, 16, 16) fp32 of noise and prompts, by DDIM with classifier-free guidance; `model` computes in bf16."""
    states, lengths = encode([*prompts, ""])
    lengths = torch.cat([lengths[:-1], lengths[-1:].expand(len(prompts))])
    states = torch.cat([states[:-1], states[-1:].expand(len(prompts), -1, -1)]).to(model.device, torch.bfloat16)
    mask = (torch.arange(states.shape[1]) < lengths[:, None]).to(model.device, torch.bfloat16)

    def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        both, times = torch.cat([x_t, x_t]).bfloat16(), torch.cat([t, t])
        v = model(both, encoder_hidden_states=states, timestep=times, encoder_attention_mask=mask, return_dict=False)[0]
        conditional, unconditional = v.float().chunk(2)
        return conditional, unconditional

    return sample_ddim(Schedule.from_scheduler(scheduler()), predict, noise.to(model.device), steps, guidance_scale).cpu()


def train(pictures: Path, decoder: Path, out: Path, recipe: TeacherRecipe, compiled: bool = False, start: Path | None = None) -> None:
    """Trains the teacher on a picture set and writes transformer/, vae/ and scheduler/ to `out` in diffusers layout, fp16.

    start: a teacher to train further, deepened to the recipe's layers; None begins with a new network. Raises InputError for folders that
    do not hold what they should, and as loop.run does.
    """
    shown = load_module(require(decoder, "train decoder"), PixelShuffleDecoder)
    if start is not None:
        require(check_folder(start) / "transformer", "train teacher")
    device = default_device()
    data = TrainingSet(pictures, device=device)
    torch.manual_seed(recipe.seed)
    inputs = {"data": fingerprint(pictures / "dataset.json"), "decoder": fingerprint(decoder / WEIGHTS)}
    if start is None:
        model = transformer(recipe.layers)
    else:
        before = start / "transformer"
        model = deepened(load_module(before, PixArtTransformer2DModel), recipe.layers).requires_grad_(True)
        inputs["start"] = fingerprint(before / WEIGHTS)
    model.to(device).set_attn_processor(PlainAttention(attention if device.type == "cpu" else fused_attention))
    weights = MasterWeights(model, ema=0.9995, muon=recipe.muon)  # made of what the file holds, before it is rounded
    model.bfloat16()
    schedule = Schedule.from_scheduler(scheduler())
    compute = torch.compile(loss) if compiled else loss
    odds = torch.where(data.two, recipe.two_things, 1.0)

    def step(i: int, random: torch.Generator) -> dict[str, float]:
        chosen = torch.multinomial(odds, recipe.batch, replacement=True, generator=random).to(device)
        empty = (torch.rand(recipe.batch, generator=random) < recipe.prompt_dropout).to(device)
        states, mask = data.captions(chosen, empty)
        latents = data.latents[chosen].float()
        t = torch.randint(1000, (recipe.batch,), generator=random).to(device)
        noise = torch.randn(latents.shape, generator=random).to(device)
        x_t, target = schedule.noised(latents, noise, t), schedule.target(latents, noise, t)
        value = compute(model, x_t.bfloat16(), target, t, states, mask)
        value.backward()
        norm = weights.step(learning_rate(recipe.lr, i, recipe.steps))
        return {"loss": value.item(), "norm": norm}

    def averaged() -> PixArtTransformer2DModel:
        return weights.averaged(transformer(recipe.layers))

    def sample(path: Path) -> None:
        noise = torch.randn(len(SAMPLE_PROMPTS), 8, 16, 16, generator=torch.Generator().manual_seed(0))
        latents = draw(averaged().bfloat16().to(device), SAMPLE_PROMPTS, noise)
        image_grid(to_pictures(shown, latents), list(SAMPLE_PROMPTS)).save(path)

    loop.run(loop.Stage("teacher", out, recipe, inputs, former_names=FORMER_NAMES), {"teacher": weights}, step, sample)
    save_diffusers(shown, out / "vae")
    scheduler().save_pretrained(out / "scheduler")
    save_diffusers(averaged(), out / "transformer")
