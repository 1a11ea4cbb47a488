"""A student, its two teachers and one step of PG-SB of all three. Sees prompts and noise, never a picture."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snoopi_rt.export.attention import GuidedAttention, PlainAttention
from snoopi_rt.export.backbones import Denoiser, Weights
from snoopi_rt.export.backbones.network import load_decoder, read_latent
from snoopi_rt.export.guidance import find_guidance
from snoopi_rt.export.presets.preset import Preset
from snoopi_rt.export.presets.rows import PRESETS
from snoopi_rt.export.training.adversarial import Discriminator
from snoopi_rt.export.training.clip_loss import ClipJudge
from snoopi_rt.export.training.edits import Edits, read_edits
from snoopi_rt.export.training.image_grid import image_grid
from snoopi_rt.export.training.noise import Draws, draw, draw_lora, pair_noise
from snoopi_rt.export.training.optimise import MasterWeights, learning_rate
from snoopi_rt.export.training.pgsb import guidance_scales, guided, lora_loss, vsd_gradient, vsd_loss
from snoopi_rt.export.training.processes import Processes
from snoopi_rt.export.training.prompts import Prompts
from snoopi_rt.export.training.recipe import Recipe
from snoopi_rt.export.training.sampling import ddim
from snoopi_rt.export.training.schedule import Schedule
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.training.teacher_pictures import TeacherPictures
from snoopi_rt.export.training.teachers import Teachers, with_lora, without_adapters
from snoopi_rt.export.training.text_states import Text, joined, states_key
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.files import CONFIG
from snoopi_rt.export.weights.text_files import read_json
from snoopi_rt.kernels import attention, fused_attention

SHORT = 256
"""Latent tokens up to which attention written out trains faster on a CPU: torch's fused one spends half a step in its backward."""
SAMPLES = 16
"""Pictures on a sheet, of the first prompts."""


class Distillation:
    """A student, its two teachers and a step of all of them."""

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        denoiser: Denoiser,
        schedule: Schedule,
        processes: Processes,
        compiled: bool,
        ready: Callable[[], None] = lambda: None,
    ):
        """Calls `ready` when the networks are loaded, before anything is written. Raises InputError for what does not fit."""
        self.task, self.recipe, self.denoiser, self.schedule, self.processes = task, recipe, denoiser, schedule, processes
        self.preset = _with_own_vae(PRESETS[own_preset(task.backbone)], task.teacher)
        self.device, self.dtype = processes.device, {"bf16": torch.bfloat16, "fp32": torch.float32}[recipe.precision]
        task.check(recipe)
        torch.manual_seed(recipe.seed)  # of the adapters' first values
        # The masters are made of what the files hold, before it is rounded.
        self.student, teacher = self._network(task.student or task.teacher, torch.float32), self._network(task.teacher, self.dtype)
        self.shape = (teacher.config.in_channels, *[teacher.config.sample_size] * 2)
        factor = read_latent(Weights(task.teacher), denoiser.part).factor
        self.size = (factor * self.shape[1], factor * self.shape[2])
        if recipe.student_rank:
            with_lora(self.student, denoiser.lora_targets, recipe.student_rank, 2 * recipe.student_rank)
        else:
            self.student.requires_grad_(True)
        self.teachers = Teachers(teacher, denoiser.lora_targets, recipe.lora_rank, recipe.lora_alpha)
        self.rule = schedule.rule(denoiser.timestep if recipe.timestep < 0 else recipe.timestep)
        self._set_attention()
        if recipe.checkpointing:
            for network in (self.student, self.teachers.network):
                network.enable_gradient_checkpointing()
        optimiser: dict[str, Any] = {"betas": (recipe.beta1, recipe.beta2), "clip": recipe.clip, "processes": processes}
        self.weights = MasterWeights(self.student, weight_decay=recipe.weight_decay, ema=recipe.ema, **optimiser)
        nn.Module.to(self.student, self.dtype)  # diffusers' own warns of layers that some models keep in fp32
        self.lora_weights = MasterWeights(self.teachers.network, weight_decay=0.0, ema=0.0, **optimiser)
        self._answer = denoiser.answer
        if compiled:
            # Student and teachers, with gradients and without, batches and sheets: each is a graph of its own.
            torch._dynamo.config.recompile_limit = 64
            self._answer = torch.compile(denoiser.answer)
        self.decoder = load_decoder(Weights(task.teacher), self.preset) if processes.main else None
        ready()
        # What is drawn of the seed later must not depend on whether the states are there already.
        with processes.first(), torch.random.fork_rng(devices=[]):
            self.judge = None if task.clip is None else self._clip_judge(task.clip)
            self.prompts = Prompts(task, recipe, denoiser, self.preset.max_tokens, self.device, self.dtype)
        self.pictures = self._teacher_pictures() if recipe.warm_steps or recipe.warm_weight else None
        self.edits = None if task.edits is None else Edits(self, [edit.changes for edit in read_edits(task.edits)])
        self.discriminator = Discriminator(self) if recipe.adversarial_weight else None
        if self.discriminator is not None:
            self.head_weights = MasterWeights(self.discriminator.heads, weight_decay=0.0, ema=0.0, **optimiser | {"betas": (0.5, 0.99)})

    def step(self, i: int) -> dict[str, float]:
        """One step of the student and its LoRA teacher's; named scalars, means over all processes."""
        recipe, share = self.recipe, self.processes.share(self.recipe.batch)
        size = recipe.micro_batch or len(share)
        chunks = [share[start : start + size] for start in range(0, len(share), size)]
        warming = i < recipe.warm_steps
        scalars: dict[str, Tensor] = {}

        def add(values: dict[str, Tensor], part: float) -> None:
            for name, value in values.items():
                scalars[name] = scalars.get(name, torch.zeros((), device=self.device)) + value.detach().float() * part

        drawn = []
        for chunk in chunks:
            part = len(chunk) / len(share)
            x0, loss, values = self._student_loss(i, chunk, warming)
            (loss * part).backward()
            if len(chunks) > 1:
                self.weights.accumulate()
            add(values, part)
            drawn.append(x0.detach())
        rate = learning_rate(recipe.lr, i, recipe.steps, warmup=recipe.warmup, decay_from=recipe.decay_from)
        norms = {"norm": self.weights.step(rate)}
        if self.discriminator is not None and not warming:
            for chunk in chunks:
                part = len(chunk) / len(share)
                loss, values = self.discriminator.heads_loss(i, chunk)
                (loss * part).backward()
                if len(chunks) > 1:
                    self.head_weights.accumulate()
                add(values, part)
            norms["heads_norm"] = self.head_weights.step(recipe.heads_lr)
        for turn in range(0 if warming or not recipe.vsd_weight else recipe.lora_steps):
            for chunk, x0 in zip(chunks, drawn, strict=True):
                part = len(chunk) / len(share)
                loss = self._lora_loss(i, turn, chunk, x0)
                (loss * part).backward()
                if len(chunks) > 1:
                    self.lora_weights.accumulate()
                add({"lora": loss}, part / recipe.lora_steps)
            rate = learning_rate(recipe.lora_lr, i, recipe.steps, warmup=recipe.warmup, decay_from=1.0)
            norms["lora_norm"] = self.lora_weights.step(rate)
        scalars["spread"] = self._spread(torch.cat(drawn))
        self.processes.mean(scalars.values())
        return {**{name: value.item() for name, value in scalars.items()}, **norms}

    def wrong(self, scalars: Mapping[str, float]) -> str | None:
        """Why the run must stop."""
        if scalars["spread"] < self.recipe.collapse:
            return (
                f"the student has collapsed (deviation of its latents {scalars['spread']:.2g}, at least {self.recipe.collapse:g} is wanted)"
            )
        return None

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        """Writes what the moving average of the student makes of the first prompts, and noise of its own, as one picture."""
        count = min(SAMPLES, len(self.prompts), self.recipe.micro_batch or self.recipe.batch)
        noise = torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        self.weights.publish(averaged=True)
        latents = self.clean(noise, self.prompts.batch(range(count)), None)
        self.weights.publish()
        assert self.decoder is not None
        pictures = torch.cat([self.decoder(latent[None].cpu()) for latent in latents])
        image_grid(pictures.cpu().numpy(), self.prompts.first[:count]).save(path)

    def finished(self) -> nn.Module:
        """The student as it is shipped: the moving average in fp32, a LoRA merged into weights that were never rounded.

        No step can follow: what only training needs is let go first, since the student becomes twice as large.
        """
        self.discriminator = None
        del self.teachers, self.lora_weights
        self.weights.adams.clear()
        self.student.float()
        if self.recipe.student_rank:
            original = dict(self._network(self.task.student or self.task.teacher, torch.float32).named_parameters())
            for name, parameter in self.student.named_parameters():
                if not parameter.requires_grad:
                    parameter.data = original[name.replace(".base_layer", "")].data
        self.weights.publish(averaged=True)
        for module in list(self.student.modules()):
            if hasattr(module, "merge"):
                module.merge()
        return without_adapters(self.student)

    def _spread(self, x0: Tensor) -> Tensor:
        """The deviation of clean latents over the whole batch, of one alone over itself: falls towards 0 when the student collapses."""
        if self.recipe.batch == 1:
            return x0.std()
        moments = torch.stack([x0.mean(0), x0.square().mean(0)])
        self.processes.mean([moments])
        return (moments[1] - moments[0].square()).clamp(min=0).sqrt().mean()

    def _student_loss(self, i: int, samples: range, warming: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        recipe = self.recipe
        terms: list[tuple[float, Callable[[int, range], tuple[Tensor, Tensor, dict[str, Tensor]]]]] = []
        if recipe.vsd_weight and not warming:
            terms.append((recipe.vsd_weight, self._vsd_loss))
        if self.pictures is not None and (warming or recipe.warm_weight):
            terms.append((1.0 if warming else recipe.warm_weight, self.pictures.loss))
        if self.edits is not None and not warming:
            terms.append((recipe.edit_weight, self.edits.loss))
        if self.discriminator is not None and not warming:
            terms.append((recipe.adversarial_weight, self.discriminator.student_loss))
        found = [term(i, samples) for _, term in terms]
        loss = torch.stack([weight * part for (weight, _), (_, part, _) in zip(terms, found, strict=True)]).sum()
        return found[0][0], loss, {name: value for _, _, values in found for name, value in values.items()}

    def _vsd_loss(self, i: int, samples: range) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        recipe = self.recipe
        draws = draw(recipe, i, samples, self.shape, self.prompts.negatives, self.device)
        rows = self.prompts.of_step(i, samples)
        text, empty = self.prompts.batch(rows), self.prompts.batch([-1] * len(rows))
        negative = self.prompts.negative(draws.negative)
        x0 = self.clean(draws.noise, text, None if negative is None else (negative, recipe.nasa_max * draws.nasa))
        gradient = self._gradient(x0.detach(), draws, text, empty, negative)
        loss, values = vsd_loss(x0, gradient), {"vsd": gradient.square().mean()}
        if self.judge is not None:
            weight = recipe.clip_weight * (1 - i / recipe.steps)
            values["clip"] = self.judge.loss(x0, rows, recipe.clip_threshold)
            loss = loss + weight * values["clip"]
        return x0, loss, values

    @torch.no_grad()
    def _gradient(self, x0: Tensor, draws: Draws, text: Text, empty: Text, negative: Text | None) -> Tensor:
        """`negative`: what the frozen teacher is guided away from besides the empty prompt, as far as the student is (NASA-T)."""
        recipe, schedule = self.recipe, self.schedule
        x_t = schedule.noised(x0, draws.eps, draws.t)
        frozen, lora = guidance_scales(draws.kappa, recipe.kappa_min, recipe.kappa_max, recipe.kappa_on, recipe.lora_kappa)
        with self.teachers.frozen() as network:
            wanted, unwanted = self.both(network, x_t, draws.t, text, empty)
            if negative is not None:
                unwanted = guided(self.say(network, x_t, draws.t, negative), unwanted, draws.nasa.view(-1, 1, 1, 1))
            frozen_x0 = schedule.x0(x_t, guided(wanted, unwanted, frozen), draws.t)
        if recipe.lora_kappa == 1:
            said = self.say(self.teachers.network, x_t, draws.t, text)
        else:
            said = guided(*self.both(self.teachers.network, x_t, draws.t, text, empty), lora)
        lora_x0 = schedule.x0(x_t, said, draws.t)
        return vsd_gradient(x0, frozen_x0, lora_x0, *schedule.alpha_sigma(draws.t), recipe.weight)

    def _lora_loss(self, i: int, turn: int, samples: range, x0: Tensor) -> Tensor:
        draws = draw_lora(self.recipe, i, turn, samples, self.shape, self.device)
        rows = [-1 if empty else row for row, empty in zip(self.prompts.of_step(i, samples), draws.empty, strict=True)]
        said = self.say(self.teachers.network, self.schedule.noised(x0, draws.eps, draws.t), draws.t, self.prompts.batch(rows))
        alpha, _ = self.schedule.alpha_sigma(draws.t)
        return lora_loss(said, self.schedule.target(x0, draws.eps, draws.t), alpha, self.recipe.lora_weighted)

    def _teacher_pictures(self) -> TeacherPictures:
        recipe, task = self.recipe, self.task
        # All on which the pairs of noise and prompt depend, and what the teacher draws of them.
        own = [recipe.seed, recipe.timestep, recipe.warm_calls, recipe.kappa_min + recipe.kappa_max, recipe.precision]
        key = hashlib.sha256(json.dumps([states_key(task.prompts, task.teacher / self.denoiser.part), *own]).encode()).hexdigest()[:16]
        with self.processes.first():
            return TeacherPictures(self, task.out / "pictures", key)

    def given(self, pairs: Sequence[int]) -> tuple[Tensor, Text]:
        """The noise (B, C, h, w) and the prompts of some pairs, by their numbers."""
        return pair_noise(self.recipe, pairs, self.shape, self.device), self.prompts.batch(self.prompts.of_pairs(pairs))

    def teacher_pictures(self, noise: Tensor, text: Text, calls: int) -> Tensor:
        """Clean latents (B, C, h, w) fp32 of the frozen teacher in so many calls, guided by kappa's mean."""
        empty, scale = self.prompts.batch([-1] * len(noise)), (self.recipe.kappa_min + self.recipe.kappa_max) / 2
        with self.teachers.frozen() as network:
            return ddim(self.schedule, lambda x_t, t: self.both(network, x_t, t, text, empty), noise, calls, scale)

    def clean(self, noise: Tensor, text: Text, negative: tuple[Text, Tensor] | None) -> Tensor:
        """Clean latents (B, C, h, w) fp32 of the student in one call, with a negative and its scale (B,)."""
        t = torch.full((len(noise),), int(self.rule.timestep), device=self.device)
        other = None if negative is None else (negative[0].states, negative[0].mask, negative[1].to(self.dtype))
        return self.rule.x0(noise, self.say(self.student, noise, t, text, other))

    def both(self, network: nn.Module, x_t: Tensor, t: Tensor, text: Text, other: Text) -> tuple[Tensor, Tensor]:
        """The answers to two prompts, in one call."""
        first, second = self.say(network, torch.cat([x_t, x_t]), torch.cat([t, t]), joined(text, other)).chunk(2)
        return first, second

    def say(self, network: nn.Module, x_t: Tensor, t: Tensor, text: Text, negative: tuple | None = None) -> Tensor:
        return self._answer(network, x_t.to(self.dtype), t, text.states, text.mask, negative, self.size).float()

    def _network(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        network = load_module(folder / self.denoiser.part, self.denoiser.kind, dtype=dtype)
        # Weights of this dtype are mapped from the file: training writes into them.
        for parameter in network.parameters():
            parameter.data = parameter.data.to(self.device, copy=True)
        return network.to(self.device)

    def _set_attention(self) -> None:
        tokens = (self.shape[-1] // getattr(self.student.config, "patch_size", 1)) ** 2
        form = attention if self.device.type == "cpu" and tokens <= SHORT else fused_attention
        self.teachers.set_attention(PlainAttention(form))
        if not self.recipe.nasa_max:
            self.student.set_attn_processor(PlainAttention(form))
        else:
            attend = nasa_kernel(self.device)
            self.student.set_attn_processor(GuidedAttention(find_guidance("nasa"), torch.empty(0), form, attend))

    def _clip_judge(self, clip: Path) -> ClipJudge:
        return ClipJudge(self.preset, self.task.teacher, clip, self.task.prompts, self.task.states_folder("clip"), self.device)


def nasa_kernel(device: torch.device) -> Callable[..., Tensor] | None:
    """What takes the place of NASA's formula on the device: our kernel on a GPU, where torch brings triton along; elsewhere nothing."""
    if device.type != "cuda":
        return None
    from snoopi_rt.kernels.nasa import fused_nasa_attention

    return fused_nasa_attention


def own_preset(backbone: str) -> str:
    """The preset of the students that are trained here."""
    return backbone if backbone in PRESETS else f"pgsb-{backbone}"


def _with_own_vae(preset: Preset, teacher: Path) -> Preset:
    """The preset with the scale of the teacher's own autoencoder: PixArt alpha's and sigma's differ."""
    config = read_json(teacher / "vae" / CONFIG)
    # AutoencoderTiny reads the scaled latent itself.
    own = config.get("scaling_factor") if config.get("_class_name") == "AutoencoderKL" else None
    return replace(preset, vae_scaling=own or preset.vae_scaling)
