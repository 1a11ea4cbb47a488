"""The networks of a run, student, frozen teacher and LoRA teacher, and how they are called."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from snoopi_rt.export.attention import GuidedAttention, NegativePrompt, PlainAttention, fused_guidance
from snoopi_rt.export.backbones import Denoiser, Weights
from snoopi_rt.export.backbones.network import read_latent
from snoopi_rt.export.guidance import find_guidance
from snoopi_rt.export.training.recipe import StudentRecipe
from snoopi_rt.export.training.sampling import sample_ddim
from snoopi_rt.export.training.schedule import Schedule
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.training.teacher_pair import TeacherPair, with_lora, without_adapters
from snoopi_rt.export.training.text_states import TextBatch, joined
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.kernels import attention, fused_attention

SHORT = 256
"""Latent tokens up to which attention written out trains faster on a CPU: half a step goes into the backward pass of torch's fused one."""


class Models:
    """The student and its two teachers on one device.

    `student` takes gradients; `teachers` are the frozen and the LoRA teacher. `rule`: how the student is called and read.
    `shape`: of a latent, (C, h, w). `size`: of an image, height and width in pixels. `dtype`: in which the networks compute.
    Raises InputError for weights that do not fit and for a timestep at which the student cannot be read.
    """

    def __init__(
        self, task: Task, recipe: StudentRecipe, denoiser: Denoiser, schedule: Schedule, device: torch.device, compiled: bool = False
    ):
        self.task, self.recipe, self.denoiser, self.schedule, self.device = task, recipe, denoiser, schedule, device
        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[recipe.precision]
        torch.manual_seed(recipe.seed)  # of the adapters' first values
        # In fp32, so that master weights are made of what the files hold before it is rounded: see `round_student`.
        self.student, teacher = self._load(task.student or task.teacher, torch.float32), self._load(task.teacher, self.dtype)
        self.shape: tuple[int, ...] = (teacher.config.in_channels, *[teacher.config.sample_size] * 2)
        factor = read_latent(Weights(task.teacher), denoiser.part).factor
        self.size = (factor * self.shape[1], factor * self.shape[2])
        if recipe.student_rank:
            with_lora(self.student, denoiser.lora_targets, recipe.student_rank, 2 * recipe.student_rank)
        else:
            self.student.requires_grad_(True)
        self.teachers = TeacherPair(teacher, denoiser.lora_targets, recipe.lora.rank, recipe.lora.alpha)
        self.rule = schedule.rule(denoiser.timestep if recipe.timestep < 0 else recipe.timestep)
        self._empty: tuple[Tensor, ...] = ()
        self._set_attention()
        if recipe.checkpointing:
            for network in (self.student, self.teachers.network):
                network.enable_gradient_checkpointing()
        self._call = denoiser.predict
        if compiled:
            # Student and teachers, with gradients and without, batches and sample grids: each is a graph of its own.
            torch._dynamo.config.recompile_limit = 64
            self._call = torch.compile(denoiser.predict)

    def round_student(self) -> None:
        """Rounds the student to the dtype in which it computes."""
        nn.Module.to(self.student, self.dtype)  # diffusers' own warns of layers that some models keep in fp32

    def measure_from(self, empty: TextBatch) -> None:
        """Takes the empty prompt (a batch of one), from which some kinds of guidance measure."""
        if find_guidance(self.recipe.negative_kind).measures_from_empty:
            self._empty = (empty.states if empty.mask is None else empty.states[:, empty.mask[0]],)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, text: TextBatch, negative: NegativePrompt | None = None) -> Tensor:
        """The network's prediction (B, C, h, w) fp32 for x_t (B, C, h, w) at t (B,); `negative`: states, mask and scale."""
        return self._call(network, x_t.to(self.dtype), t, text.states, text.mask, negative, self.size).float()

    def predict_both(self, network: nn.Module, x_t: Tensor, t: Tensor, text: TextBatch, other: TextBatch) -> tuple[Tensor, Tensor]:
        """The predictions for two prompts per sample, in one call."""
        first, second = self.predict(network, torch.cat([x_t, x_t]), torch.cat([t, t]), joined(text, other)).chunk(2)
        return first, second

    def clean(
        self, noise: Tensor, text: TextBatch, negative: tuple[TextBatch, Tensor] | None = None, network: nn.Module | None = None
    ) -> Tensor:
        """Clean latents (B, C, h, w) fp32 of the student in one call; `negative`: negative prompts and their scales (B,).

        `network`: another student than the one that learns.
        """
        t = torch.full((len(noise),), int(self.rule.timestep), device=self.device)
        other = None if negative is None else (negative[0].states, negative[0].mask, negative[1].to(self.dtype), *self._empty)
        return self.rule.x0(noise, self.predict(self.student if network is None else network, noise, t, text, other))

    def first_student(self) -> nn.Module:
        """The student as its training begins, frozen and without negative prompts; the same in a resumed run."""
        network = self._load(self.task.student or self.task.teacher, self.dtype).requires_grad_(False)
        network.set_attn_processor(PlainAttention(self._attention))
        return network

    def sample_teacher(self, noise: Tensor, text: TextBatch, unconditional: TextBatch, steps: int, guidance_scale: float) -> Tensor:
        """Clean latents (B, C, h, w) fp32 of the frozen teacher in several steps with classifier-free guidance."""
        with self.teachers.frozen() as network:
            return sample_ddim(
                self.schedule, lambda x_t, t: self.predict_both(network, x_t, t, text, unconditional), noise, steps, guidance_scale
            )

    def finished(self, publish: Callable[[], None]) -> nn.Module:
        """The student as it ships, in fp32: `publish` writes its final weights, then a LoRA is merged into weights never rounded.

        Nothing can be trained afterwards: the teachers are let go first, since the student becomes twice as large.
        """
        del self.teachers
        self.student.float()
        if self.recipe.student_rank:
            original = dict(self._load(self.task.student or self.task.teacher, torch.float32).named_parameters())
            for name, parameter in self.student.named_parameters():
                if not parameter.requires_grad:
                    parameter.data = original[name.replace(".base_layer", "")].data
        publish()
        for module in list(self.student.modules()):
            if hasattr(module, "merge"):
                module.merge()
        return without_adapters(self.student)

    def _load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        network = load_module(folder / self.denoiser.part, self.denoiser.kind, dtype=dtype)
        # Weights of this dtype are mapped from the file: training writes into them.
        for parameter in network.parameters():
            parameter.data = parameter.data.to(self.device, copy=True)
        return network.to(self.device)

    def _set_attention(self) -> None:
        tokens = (self.shape[-1] // getattr(self.student.config, "patch_size", 1)) ** 2
        self._attention = form = attention if self.device.type == "cpu" and tokens <= SHORT else fused_attention
        self.teachers.set_attention(PlainAttention(form))
        if not self.recipe.negative_scale_max:
            self.student.set_attn_processor(PlainAttention(form))
        else:
            kind = self.recipe.negative_kind
            largest = max(attn.inner_dim // attn.heads for attn in self.student.modules() if isinstance(attn, Attention))
            fused = fused_guidance(kind, self.device, largest)
            self.student.set_attn_processor(GuidedAttention(find_guidance(kind), torch.empty(0), form, fused))
