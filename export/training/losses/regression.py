"""The distance to what the teacher draws of the same noise and prompt (DMD's regression loss), alone at first or beside other losses."""

import torch
from torch import Tensor, nn

from snoopi_rt.export.training.loop import random_stream
from snoopi_rt.export.training.losses.loss import Loss, Term
from snoopi_rt.export.training.losses.teacher_features import TeacherFeatures, feature_distance
from snoopi_rt.export.training.recipe import LossSettings, Regression
from snoopi_rt.export.training.run import Run, Samples, StudentBatch
from snoopi_rt.export.training.text_states import TextBatch

FEATURES_T_MAX = 400
"""Features are compared at timesteps up to this: beyond it the noise hides what the distance in latents leaves blurred."""


class RegressionLoss(Loss):
    """The mean squared distance of clean latents on pairs of noise and prompt of which the teacher's picture is kept.

    With `features`, that of the frozen teacher's features of both besides: the self-perceptual loss of Lin and Yang 2023, which blurs less.
    """

    Settings = Regression
    settings: Regression

    def __init__(self, run: Run, settings: Regression):
        super().__init__(run, settings)
        self._pictures = run.teacher_pictures
        self._features = TeacherFeatures(run.models) if settings.features else None

    @classmethod
    def is_used(cls, settings: LossSettings) -> bool:
        assert isinstance(settings, Regression)
        return settings.weight > 0 or settings.warmup_steps > 0

    def weight(self, step: int) -> float:
        return 1.0 if step < self.settings.warmup_steps else self.settings.weight

    def term(self, batch: StudentBatch) -> Term:
        run, samples = self.run, batch.samples
        pairs = run.rows(samples, len(self._pictures))
        target = self._pictures.latents(pairs).to(run.models.device)
        noise, text = run.pairs(pairs)
        x0 = run.models.clean(noise, text)
        loss = nn.functional.mse_loss(x0, target)
        logged = {"regression": loss}
        if self._features is not None:
            logged["features"] = self._feature_distance(self._features, samples, x0, target, text)
            loss = loss + self.settings.features * logged["features"]
        return Term(x0, loss, logged)

    def _feature_distance(self, features: TeacherFeatures, samples: Samples, x0: Tensor, target: Tensor, text: TextBatch) -> Tensor:
        recipe, device = self.run.recipe, x0.device
        streams = [random_stream(recipe.seed, samples.step, number, "features") for number in samples.numbers]
        eps = torch.stack([torch.randn(*x0.shape[1:], generator=stream) for stream in streams]).to(device)
        last = max(recipe.t_min, FEATURES_T_MAX)
        t = torch.stack([torch.randint(recipe.t_min, last + 1, (), generator=stream) for stream in streams]).to(device)
        with torch.no_grad():
            expected = features(target, eps, t, text)
        return feature_distance(features(x0, eps, t, text), expected).mean()
