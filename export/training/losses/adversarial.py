"""A discriminator in latent space, for a student as sharp as its teacher: heads on the frozen teacher's own features.

Real pictures are the teacher's of the same prompts, so that no image is needed. Both are noised before the teacher sees them, as in LADD
(Sauer et al. 2024) and DMD2 (Yin et al. 2024).
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from snoopi_rt.errors import InputError
from snoopi_rt.export.training.loop import random_stream
from snoopi_rt.export.training.losses.loss import Loss, Term
from snoopi_rt.export.training.losses.teacher_features import TeacherFeatures
from snoopi_rt.export.training.recipe import Adversarial, LossSettings, Regression, StudentRecipe
from snoopi_rt.export.training.run import Log, Run, Samples, StudentBatch, descend, master_weights
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.training.text_states import TextBatch

WIDTH = 128


class Heads(nn.Module):
    """Tokens (B, N, D) of each layer to logits (B, M), one per token and layer: above 0 is real."""

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(size), nn.Linear(size, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1)) for size in sizes
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        return torch.cat([head(features.float()).squeeze(-1) for head, features in zip(self.heads, maps, strict=True)], 1)


class AdversarialLoss(Loss):
    """The hinge loss of a discriminator: the student's side in `term`, the heads' in `follow`."""

    Settings = Adversarial
    settings: Adversarial

    def __init__(self, run: Run, settings: Adversarial):
        super().__init__(run, settings)
        self._pictures, self._features = run.teacher_pictures, TeacherFeatures(run.models)
        noise, text = run.pairs([0])
        with torch.no_grad():
            maps = self._features(noise, noise, torch.zeros(1, dtype=torch.int64, device=run.models.device), text)
        self.heads = Heads([features.shape[2] for features in maps]).to(run.models.device)
        self._weights = master_weights(self.heads, run.recipe, run.processes, betas=(0.5, 0.99))
        self.trained = {"heads": self._weights}

    @classmethod
    def check(cls, settings: LossSettings, task: Task, recipe: StudentRecipe) -> None:
        pictures = recipe.losses["regression"]
        assert isinstance(pictures, Regression)
        if settings.weight and not (pictures.warmup_steps or pictures.weight):
            raise InputError("the discriminator needs the teacher's pictures: a regression.weight above 0")

    def term(self, batch: StudentBatch) -> Term:
        self.heads.requires_grad_(False)
        noise, *seen = self._seen(batch.samples)
        fake = self.run.models.clean(noise, seen[-1])
        logits = self.heads(self._features(fake, *seen))
        return Term(fake, -logits.mean(), {"fooled": (logits > 0).float().mean()})

    def follow(self, step: int, drawn: Mapping[Samples, Tensor], log: Log) -> None:
        log.norms["heads_norm"] = descend(self._weights, drawn, partial(self.heads_loss, drawn), self.settings.lr, log)

    def heads_loss(self, drawn: Mapping[Samples, Tensor], samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        """The heads' loss on what the student has drawn and on the teacher's pictures of the same prompts, and scalars for the log."""
        with torch.no_grad():
            _, *seen = self._seen(samples)
            real = self._pictures.latents(self._pairs(samples)).to(self.run.models.device)
            maps = [self._features(latents, *seen) for latents in (drawn[samples], real)]
        self.heads.requires_grad_(True)
        fakes, reals = (self.heads(features) for features in maps)
        loss = torch.relu(1 + fakes).mean() + torch.relu(1 - reals).mean()
        return loss, {"heads": loss, "real": (reals > 0).float().mean()}

    def _pairs(self, samples: Samples) -> list[int]:
        return self.run.rows(samples, len(self._pictures), order=1)

    def _seen(self, samples: Samples) -> tuple[Tensor, Tensor, Tensor, TextBatch]:
        """The student's noise; the noise and the timesteps (B,) with which the discriminator sees pictures, and their prompts."""
        run, recipe, models = self.run, self.run.recipe, self.run.models
        streams = [random_stream(recipe.seed, samples.step, number, "judged") for number in samples.numbers]
        noise, eps = torch.stack([torch.randn(2, *models.shape, generator=stream) for stream in streams], 1).to(models.device)
        t = torch.stack([torch.randint(recipe.t_min, recipe.t_max + 1, (), generator=stream) for stream in streams]).to(models.device)
        return noise, eps, t, run.prompts.batch([pair % len(run.prompts) for pair in self._pairs(samples)])
