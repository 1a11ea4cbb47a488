"""The teacher stage: a small PixArt transformer by v-prediction on latents, with zero terminal SNR and 10 % empty captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, PixArtTransformer2DModel
from torch import Tensor

from snoopi_rt.export.attention import PlainAttention
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.optimise import MasterWeights, learning_rate
from snoopi_rt.export.training.small.autoencoder import to_pictures
from snoopi_rt.export.training.small.emoji import image_grid
from snoopi_rt.export.training.small.latents import Captions, encode_captions, load_captions, load_latents
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.files import WEIGHTS, fingerprint, require, save_diffusers

SAMPLE_PROMPTS = (
    "a cat on a blue background",
    "an apple on a white background",
    "a rocket on a black background",
    "a house on a yellow background",
    "a hamburger",
    "a sunflower on a purple background",
    "a panda on a red background",
    "a cartoon of a car on a pink background",
    "a 3d render of a crown on a green background",
    "a flat drawing of a fish on a gray background",
    "a tree on an orange background",
    "a key on a brown background",
    "a blurry dog on a green background",
    "a pixelated heart on a white background",
    "a grainy banana on a blue background",
    "a guitar, grayscale",
)


@dataclass(frozen=True)
class Recipe(loop.StageRecipe):
    """The settings of this stage."""

    steps: int = 12000
    batch: int = 64
    lr: float = 1e-3
    empty: float = 0.1  # share of captions replaced by the empty prompt, for guidance


def network() -> PixArtTransformer2DModel:
    """The transformer of the small backbone for latents (B, 8, 16, 16); 6.0 M parameters."""
    model = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=8,
        out_channels=8,
        num_layers=5,
        cross_attention_dim=256,
        sample_size=16,
        patch_size=2,
        caption_channels=384,
        use_additional_conditions=False,
    )
    torch.nn.init.zeros_(model.proj_out.weight)  # the first answer is 0, the mean of v
    model.set_attn_processor(PlainAttention())
    return model


def schedule() -> DDIMScheduler:
    """SD's beta schedule rescaled to zero terminal SNR, so that the last step is pure noise and background colours are learned."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def alpha_sigma(scheduler: DDIMScheduler, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma (B, 1, 1, 1) fp32 of timesteps t (B,)."""
    acp = scheduler.alphas_cumprod[t].float().view(-1, 1, 1, 1)
    return acp.sqrt(), (1 - acp).sqrt()


def loss(model: PixArtTransformer2DModel, noisy: Tensor, target: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of v = alpha * noise - sigma * latent."""
    v = model(noisy, encoder_hidden_states=states, timestep=t, encoder_attention_mask=mask, return_dict=False)[0]
    return (v.float() - target).square().mean()


@torch.no_grad()
def draw(model: PixArtTransformer2DModel, prompts: Captions, rows: Tensor, noise: Tensor, steps: int = 25, guidance: float = 2.5) -> Tensor:
    """Latents (B, 8, 16, 16) fp32 that the teacher draws from noise by DDIM with classifier-free guidance; caption row 0 is empty."""
    scheduler = schedule()
    scheduler.set_timesteps(steps)
    states, mask = prompts.batch(torch.cat([rows, torch.zeros_like(rows)]))
    latents = noise
    for t in scheduler.timesteps:
        both = torch.cat([latents, latents]).bfloat16()
        v = model(both, encoder_hidden_states=states, timestep=t.expand(len(both)), encoder_attention_mask=mask, return_dict=False)[
            0
        ].float()
        conditional, empty = v.chunk(2)
        latents = scheduler.step(empty + guidance * (conditional - empty), t, latents, return_dict=False)[0]
    return latents


def sample_captions(prompts: Sequence[str] = SAMPLE_PROMPTS) -> Captions:
    """The prompts of the sample sheets, encoded; `of_picture` has their rows in order."""
    return encode_captions(list(prompts))


def sheet(latents: Tensor, autoencoder: AutoencoderTiny, prompts: Sequence[str], path: Path) -> None:
    """Writes the decoded latents with their prompts as one picture."""
    image_grid(to_pictures(autoencoder.decoder(latents)), list(prompts)).save(path)


def train(pictures: Path, autoencoder: Path, out: Path, recipe: Recipe, compiled: bool = False, start: Path | None = None) -> None:
    """Trains the teacher on a picture set and writes transformer/, vae/ and scheduler/ to `out` in diffusers layout, fp16.

    `start`: a teacher that is trained on, instead of a new network.
    """
    require(autoencoder, "train autoencoder")
    captions, all_latents = load_captions(pictures), load_latents(pictures, autoencoder, out)
    torch.manual_seed(recipe.seed)
    model = network()
    inputs = {"data": fingerprint(pictures / "dataset.json"), "autoencoder": fingerprint(autoencoder / WEIGHTS)}
    if start is not None:
        before = require(start / "transformer", "train teacher")
        model.load_state_dict(load_module(before, PixArtTransformer2DModel).state_dict())
        inputs["start"] = fingerprint(before / WEIGHTS)
    weights = MasterWeights(model, ema=0.9995)  # of what the file holds, before it is rounded
    model.bfloat16()
    scheduler = schedule()
    compute = torch.compile(loss) if compiled else loss
    decoder = AutoencoderTiny.from_pretrained(autoencoder)
    shown = sample_captions()

    def step(i: int, random: torch.Generator) -> dict[str, float]:
        chosen = torch.randint(len(all_latents), (recipe.batch,), generator=random)
        empty = torch.rand(recipe.batch, generator=random) < recipe.empty
        states, mask = captions.batch(captions.of_picture[chosen].masked_fill(empty, 0))
        latents = all_latents[chosen].float()
        t = torch.randint(1000, (recipe.batch,), generator=random)
        noise = torch.randn(latents.shape, generator=random)
        alpha, sigma = alpha_sigma(scheduler, t)
        value = compute(model, (alpha * latents + sigma * noise).bfloat16(), alpha * noise - sigma * latents, t, states, mask)
        value.backward()
        norm = weights.step(learning_rate(recipe.lr, i, recipe.steps))
        return {"loss": value.item(), "norm": norm}

    def averaged() -> PixArtTransformer2DModel:
        return weights.averaged(network())

    def sample(path: Path) -> None:
        noise = torch.randn(len(SAMPLE_PROMPTS), 8, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            sheet(draw(averaged().bfloat16(), shown, shown.of_picture, noise), decoder, SAMPLE_PROMPTS, path)

    loop.run(loop.Stage("teacher", out, recipe, inputs), {"teacher": weights}, step, sample)
    save_diffusers(decoder, out / "vae")
    scheduler.save_pretrained(out / "scheduler")
    save_diffusers(averaged(), out / "transformer")
