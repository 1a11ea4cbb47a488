"""The student stage: PG-SB distils the teacher into a network that draws in one call. Sees captions and noise, never a picture."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, PixArtTransformer2DModel
from peft import LoraConfig, get_peft_model
from torch import Tensor

from snoopi_rt.export.attention import PlainAttention
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.latents import load_captions
from snoopi_rt.export.training.optimise import MasterWeights, learning_rate
from snoopi_rt.export.training.pgsb import guided, random_kappa, v_target, vsd_gradient, vsd_loss, x0_from_v
from snoopi_rt.export.training.teacher import SAMPLE_PROMPTS, alpha_sigma, sample_captions, sheet
from snoopi_rt.export.weights import WEIGHTS, fingerprint, require, save_diffusers

FED_TIMESTEP = 999  # where zero terminal SNR makes z pure noise and x0 = -v
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


@dataclass(frozen=True)
class Recipe(loop.Recipe):
    """The settings of this stage."""

    steps: int = 3000
    batch: int = 32
    lr: float = 1e-4
    lora_lr: float = 1e-3
    lora_rank: int = 64
    kappa_min: float = 1.0
    kappa_max: float = 3.5  # on both teachers, one draw a sample
    t_min: int = 20
    t_max: int = 980
    empty: float = 0.1  # share of captions that the LoRA teacher sees as the empty prompt: guidance on it needs that


def predict_v(model: PixArtTransformer2DModel, x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """The network's answer in fp32 for x (B, 8, 16, 16)."""
    return model(x.bfloat16(), encoder_hidden_states=states, timestep=t, encoder_attention_mask=mask, return_dict=False)[0].float()


def draw(student: PixArtTransformer2DModel, scheduler: DDIMScheduler, noise: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """Clean latents (B, 8, 16, 16) fp32 in one call."""
    t = torch.full((len(noise),), FED_TIMESTEP)
    return x0_from_v(noise, predict_v(student, noise, t, states, mask), *alpha_sigma(scheduler, t))


def train(pictures: Path, teacher_folder: Path, out: Path, recipe: Recipe, compiled: bool = False) -> None:
    """Distils the teacher on the captions of a picture set and writes transformer/, vae/ and scheduler/ to `out`: what export reads."""
    require(teacher_folder / "transformer", "train teacher")
    captions = load_captions(pictures)
    torch.manual_seed(recipe.seed)
    student, teacher = (_load(teacher_folder, torch.bfloat16) for _ in range(2))
    # One network is both teachers: with the adapters off it is the frozen one. They stay in bf16, since their masters are fp32.
    config = LoraConfig(r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules=list(LORA_TARGETS))
    adapted = get_peft_model(teacher, config, autocast_adapter_dtype=False)
    betas = (0.0, 0.99)
    weights = MasterWeights(student, betas=betas, weight_decay=0.0, ema=0.998)
    lora = MasterWeights(teacher, betas=betas, weight_decay=0.0)
    scheduler = DDIMScheduler.from_pretrained(teacher_folder / "scheduler")
    predict = torch.compile(predict_v) if compiled else predict_v

    def step(i: int, random: torch.Generator) -> dict[str, float]:
        rows = captions.of_picture[torch.randint(len(captions.of_picture), (recipe.batch,), generator=random)]
        states, mask = captions.batch(rows)
        z = torch.randn(recipe.batch, 8, 16, 16, generator=random)
        fed = torch.full((recipe.batch,), FED_TIMESTEP)
        x0 = x0_from_v(z, predict(student, z, fed, states, mask), *alpha_sigma(scheduler, fed))

        with torch.no_grad():
            t = torch.randint(recipe.t_min, recipe.t_max + 1, (recipe.batch,), generator=random)
            alpha, sigma = alpha_sigma(scheduler, t)
            x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=random)
            kappa = random_kappa(recipe.batch, recipe.kappa_min, recipe.kappa_max, random)
            both_states, both_mask = captions.batch(torch.cat([rows, torch.zeros_like(rows)]))
            both = torch.cat([x_t, x_t]), torch.cat([t, t]), both_states, both_mask
            with adapted.disable_adapter():
                conditional, empty_v = predict(teacher, *both).chunk(2)
            frozen_x0 = x0_from_v(x_t, guided(conditional, empty_v, kappa), alpha, sigma)
            conditional, empty_v = predict(teacher, *both).chunk(2)
            lora_x0 = x0_from_v(x_t, guided(conditional, empty_v, kappa), alpha, sigma)
        gradient = vsd_gradient(x0.detach(), frozen_x0, lora_x0)
        vsd_loss(x0, gradient).backward()
        norm = weights.step(learning_rate(recipe.lr, i, recipe.steps, decay_from=0.7))

        clean = x0.detach()
        eps = torch.randn(clean.shape, generator=random)
        t = torch.randint(1000, (recipe.batch,), generator=random)
        alpha, sigma = alpha_sigma(scheduler, t)
        empty = torch.rand(recipe.batch, generator=random) < recipe.empty
        said = predict(teacher, alpha * clean + sigma * eps, t, *captions.batch(rows.masked_fill(empty, 0)))
        lora_loss = (said - v_target(clean, eps, alpha, sigma)).square().mean()
        lora_loss.backward()
        lora_norm = lora.step(learning_rate(recipe.lora_lr, i, recipe.steps, decay_from=1.0))
        return {
            "vsd": gradient.square().mean().item(),
            "lora": lora_loss.item(),
            "spread": clean.std(0).mean().item(),  # falls towards 0 when the student collapses
            "norm": norm,
            "lora_norm": lora_norm,
        }

    decoder = AutoencoderTiny.from_pretrained(teacher_folder / "vae")
    shown = sample_captions()

    def averaged() -> PixArtTransformer2DModel:
        copy = _load(teacher_folder, torch.float32)
        copy.load_state_dict(weights.averaged(), strict=False)
        return copy.eval()

    @torch.no_grad()
    def sample(path: Path) -> None:
        noise = torch.randn(len(SAMPLE_PROMPTS), 8, 16, 16, generator=torch.Generator().manual_seed(0))
        latents = draw(averaged().bfloat16(), scheduler, noise, *shown.batch(shown.of_picture))
        sheet(latents, decoder, SAMPLE_PROMPTS, path)

    inputs = {"data": fingerprint(pictures / "dataset.json"), "teacher": fingerprint(teacher_folder / "transformer" / WEIGHTS)}
    loop.run(loop.Stage("student", out, recipe, inputs, sample_every=250), {"student": weights, "lora": lora}, step, sample)
    scheduler.save_pretrained(out / "scheduler")
    save_diffusers(decoder, out / "vae")
    save_diffusers(averaged(), out / "transformer")


def _load(folder: Path, dtype: torch.dtype) -> PixArtTransformer2DModel:
    model = PixArtTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype)
    model.set_attn_processor(PlainAttention())
    return model
