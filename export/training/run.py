"""What the losses of a run share: models, prompts and the teacher's pictures; and a step's samples."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from snoopi_rt.export.presets.preset import Preset
from snoopi_rt.export.training.models import Models
from snoopi_rt.export.training.noise import StudentNoise, pair_noise, student_noise
from snoopi_rt.export.training.optimise import MasterWeights
from snoopi_rt.export.training.processes import Processes
from snoopi_rt.export.training.prompts import TrainingPrompts
from snoopi_rt.export.training.recipe import Regression, StudentRecipe
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.training.teacher_pictures import TeacherPictures
from snoopi_rt.export.training.text_states import TextBatch, shuffled, states_key


class Run:
    """One run of PG-SB. Its prompts are encoded when it is made, by the main process before the others."""

    def __init__(self, task: Task, recipe: StudentRecipe, models: Models, processes: Processes, preset: Preset):
        self.task, self.recipe, self.models, self.processes = task, recipe, models, processes
        with self.prepared():
            self.prompts = TrainingPrompts(task, models.denoiser, preset.max_tokens, models.device, models.dtype)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Around what is computed once and kept on disk: the main process goes first, and torch's random state is as it was afterwards,
        so that later random numbers do not depend on whether the files were there already."""
        with self.processes.first(), torch.random.fork_rng(devices=[]):
            yield

    @cached_property
    def teacher_pictures(self) -> TeacherPictures:
        """What the frozen teacher draws of the run's pairs of noise and prompt, kept on disk."""
        recipe, task, settings = self.recipe, self.task, self.regression
        # All on which the pairs depend, and what the teacher draws of them.
        facts = [recipe.seed, recipe.timestep, settings.teacher_steps, recipe.guidance.min + recipe.guidance.max, recipe.precision]
        states = states_key(task.prompts, task.teacher / self.models.denoiser.part)
        key = hashlib.sha256(json.dumps([states, *facts]).encode()).hexdigest()[:16]

        def draw(pairs: Sequence[int]) -> Tensor:
            noise, text = self.pairs(pairs)
            unconditional = self.prompts.unconditional(len(noise))
            return self.models.sample_teacher(noise, text, unconditional, settings.teacher_steps, recipe.mean_guidance_scale)

        with self.processes.first():
            return TeacherPictures(task.pictures_folder, key, settings.pairs, self.models.shape, draw)

    @property
    def regression(self) -> Regression:
        """The settings of the teacher's pictures, which other losses read, too."""
        settings = self.recipe.losses["regression"]
        assert isinstance(settings, Regression)
        return settings

    def rows(self, samples: "Samples", count: int, order: int = 0) -> list[int]:
        """A row for each of the samples out of `count`: all rows in a new order each time. order: 1 is another order than 0."""
        first = samples.step * self.recipe.batch
        return [shuffled(first + number, count, self.recipe.seed + order) for number in samples.numbers]

    def pairs(self, pairs: Sequence[int]) -> tuple[Tensor, TextBatch]:
        """The noise (B, C, h, w) and the prompts of some pairs, by their numbers."""
        noise = pair_noise(self.recipe, pairs, self.models.shape, self.models.device)
        return noise, self.prompts.batch([pair % len(self.prompts) for pair in pairs])


@dataclass(frozen=True)
class Samples:
    """Some samples of a step: those of one forward and backward pass. numbers: in the step's batch."""

    step: int
    numbers: range
    share: float
    """Their share of this process's samples."""


class StudentBatch:
    """What the student draws of some samples in a step. Made when a loss first asks for it, and shared by all losses that do."""

    def __init__(self, run: Run, samples: Samples):
        self.samples, self._run = samples, run

    def __len__(self) -> int:
        return len(self.samples.numbers)

    @cached_property
    def rows(self) -> list[int]:
        """The samples' prompts, by their rows."""
        return self._run.rows(self.samples, len(self._run.prompts))

    @cached_property
    def noise(self) -> StudentNoise:
        """The samples' random numbers."""
        run, negatives = self._run, self._run.prompts.negatives
        count = 0 if negatives is None else len(negatives)
        return student_noise(run.recipe, self.samples.step, self.samples.numbers, run.models.shape, count, run.models.device)

    @cached_property
    def text(self) -> TextBatch:
        """The samples' prompts."""
        return self._run.prompts.batch(self.rows)

    @cached_property
    def negative(self) -> TextBatch | None:
        """The samples' negative prompts."""
        negatives = self._run.prompts.negatives
        return None if negatives is None else negatives.batch(self.noise.negatives)

    @cached_property
    def x0(self) -> Tensor:
        """The student's clean latents (B, C, h, w), through which gradients flow, wherever they are asked for first."""
        scale = self._run.recipe.negative_scale_max * self.noise.negative_scale
        with torch.enable_grad():
            return self._run.models.clean(self.noise.noise, self.text, None if self.negative is None else (self.negative, scale))


@dataclass
class Log:
    """The scalars of one step: `values` are means over all samples, which the processes still have to average; `norms` are alike on all."""

    values: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor], share: float) -> None:
        """Adds the values of a share of the samples."""
        for name, value in values.items():
            part = value.detach().float() * share
            self.values[name] = self.values[name] + part if name in self.values else part


def master_weights(network: nn.Module, recipe: StudentRecipe, processes: Processes, **settings: Any) -> MasterWeights:
    """Master weights of a network with the recipe's optimiser; no weight decay and no moving average by default."""
    optimiser = recipe.optimiser
    defaults = {"betas": (optimiser.beta1, optimiser.beta2), "clip": optimiser.max_norm, "weight_decay": 0.0, "ema": 0.0}
    return MasterWeights(network, **{**defaults, "processes": processes, **settings})


def descend(
    weights: MasterWeights,
    parts: Iterable[Samples],
    loss: Callable[[Samples], tuple[Tensor, dict[str, Tensor]]],
    lr: float,
    log: Log,
    turns: int = 1,
) -> float:
    """One optimiser step on the mean loss of all samples, in parts that fit into memory; the norm of its gradient.

    loss(samples): a scalar, and values for the log. turns: how many such steps the log averages.
    """
    parts = list(parts)
    for samples in parts:
        value, logged = loss(samples)
        (value * samples.share).backward()
        if len(parts) > 1:
            weights.accumulate()
        log.add(logged, samples.share / turns)
    return weights.step(lr)
