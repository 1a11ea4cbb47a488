"""The distance to what the teacher draws of the same noise and prompt (DMD's regression loss), alone at first or beside other losses."""

from torch import nn

from snoopi_rt.export.training.losses.loss import Loss, Term
from snoopi_rt.export.training.recipe import LossSettings, Regression
from snoopi_rt.export.training.run import Run, StudentBatch
from snoopi_rt.export.training.text_states import shuffled


class RegressionLoss(Loss):
    """The mean squared distance of clean latents on pairs of noise and prompt of which the teacher's picture is kept."""

    Settings = Regression
    settings: Regression

    def __init__(self, run: Run, settings: Regression):
        super().__init__(run, settings)
        self._pictures = run.teacher_pictures

    @classmethod
    def is_used(cls, settings: LossSettings) -> bool:
        assert isinstance(settings, Regression)
        return settings.weight > 0 or settings.warmup_steps > 0

    def weight(self, step: int) -> float:
        return 1.0 if step < self.settings.warmup_steps else self.settings.weight

    def term(self, batch: StudentBatch) -> Term:
        run, samples = self.run, batch.samples
        first = samples.step * run.recipe.batch
        pairs = [shuffled(first + number, len(self._pictures), run.recipe.seed) for number in samples.numbers]
        target = self._pictures.latents(pairs).to(run.models.device)
        x0 = run.models.clean(*run.pairs(pairs))
        loss = nn.functional.mse_loss(x0, target)
        return Term(x0, loss, {"regression": loss})
