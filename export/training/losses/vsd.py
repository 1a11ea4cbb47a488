"""Variational score distillation with a random guidance scale on both teachers (PG-SB, SNOOPI v3, section 4.2)."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from snoopi_rt.export.training.losses.loss import Loss, Term
from snoopi_rt.export.training.noise import lora_noise
from snoopi_rt.export.training.optimise import learning_rate
from snoopi_rt.export.training.pgsb import guidance_scales, guided, lora_loss, vsd_gradient, vsd_loss
from snoopi_rt.export.training.recipe import Vsd
from snoopi_rt.export.training.run import Log, Run, Samples, StudentBatch, descend, master_weights


class VsdLoss(Loss):
    """The frozen teacher's prediction against the LoRA teacher's, which is trained on what the student draws."""

    Settings = Vsd
    settings: Vsd

    def __init__(self, run: Run, settings: Vsd):
        super().__init__(run, settings)
        self._lora_weights = master_weights(run.models.teachers.network, run.recipe, run.processes)
        self.trained = {"lora": self._lora_weights}

    def term(self, batch: StudentBatch) -> Term:
        gradient = self._gradient(batch)
        return Term(batch.x0, vsd_loss(batch.x0, gradient), {"vsd": gradient.square().mean()})

    @torch.no_grad()
    def _gradient(self, batch: StudentBatch) -> Tensor:
        """The gradient with respect to x0. With a negative prompt, the frozen teacher is guided away from it instead of from the empty
        prompt, by the same share as the student (NASA-T, v3 section 4.3)."""
        recipe, models, schedule, noise = self.run.recipe, self.run.models, self.run.models.schedule, batch.noise
        x0, t, guidance = batch.x0.detach(), noise.t, recipe.guidance
        empty = self.run.prompts.unconditional(len(batch))
        x_t = schedule.noised(x0, noise.eps, t)
        frozen_scale, lora_scale = guidance_scales(noise.guidance, guidance.min, guidance.max, guidance.random_on, guidance.lora)
        with models.teachers.frozen() as network:
            conditional, unconditional = models.predict_both(network, x_t, t, batch.text, empty)
            if batch.negative is not None:
                share = noise.negative_scale.view(-1, 1, 1, 1)
                unconditional = guided(models.predict(network, x_t, t, batch.negative), unconditional, share)
            frozen_x0 = schedule.x0(x_t, guided(conditional, unconditional, frozen_scale), t)
        network = models.teachers.network
        if guidance.lora == 1:
            prediction = models.predict(network, x_t, t, batch.text)
        else:
            prediction = guided(*models.predict_both(network, x_t, t, batch.text, empty), lora_scale)
        lora_x0 = schedule.x0(x_t, prediction, t)
        return vsd_gradient(x0, frozen_x0, lora_x0, *schedule.alpha_sigma(t), self.settings.weighting)

    def follow(self, step: int, drawn: Mapping[Samples, Tensor], log: Log) -> None:
        recipe = self.run.recipe
        rate = learning_rate(recipe.lora.lr, step, recipe.steps, warmup=recipe.optimiser.warmup, decay_from=1.0)
        for turn in range(recipe.lora.steps):
            loss = partial(self._lora_loss, drawn, turn)
            log.norms["lora_norm"] = descend(self._lora_weights, drawn, loss, rate, log, recipe.lora.steps)

    def _lora_loss(self, drawn: Mapping[Samples, Tensor], turn: int, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        run, models, schedule, x0 = self.run, self.run.models, self.run.models.schedule, drawn[samples]
        noise = lora_noise(run.recipe, samples.step, turn, samples.numbers, models.shape, models.device)
        rows = [-1 if dropped else row for row, dropped in zip(run.rows(samples, len(run.prompts)), noise.dropped, strict=True)]
        x_t = schedule.noised(x0, noise.eps, noise.t)
        prediction = models.predict(models.teachers.network, x_t, noise.t, run.prompts.batch(rows))
        alpha, _ = schedule.alpha_sigma(noise.t)
        loss = lora_loss(prediction, schedule.target(x0, noise.eps, noise.t), alpha, run.recipe.lora.weighted)
        return loss, {"lora": loss}
