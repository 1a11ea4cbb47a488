"""A discriminator in latent space, for a student as sharp as its teacher: heads on the frozen teacher's own features.

Real pictures are the teacher's of the same prompts, so that no image is needed. Both are noised before the teacher sees them, as in LADD
(Sauer et al. 2024) and DMD2 (Yin et al. 2024).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from snoopi_rt.errors import InputError
from snoopi_rt.export.training.loop import generator
from snoopi_rt.export.training.losses.loss import Loss, Term
from snoopi_rt.export.training.recipe import Adversarial, LossSettings, Regression, StudentRecipe
from snoopi_rt.export.training.run import Log, Run, Samples, StudentBatch, descend, master_weights
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.training.text_states import TextBatch, shuffled

WIDTH = 128


class Heads(nn.Module):
    """Feature maps, (B, N, D) tokens or (B, D, h, w), to logits (B, M), one per token and map: above 0 is real."""

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(size), nn.Linear(size, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1)) for size in sizes
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        tokens = [features.flatten(2).transpose(1, 2) if features.ndim == 4 else features for features in maps]
        return torch.cat([head(features.float()).squeeze(-1) for head, features in zip(self.heads, tokens, strict=True)], 1)


def feature_layers(network: nn.Module) -> list[nn.Module]:
    """The layers whose outputs the heads see: at three depths of a transformer, in the middle of a UNet."""
    blocks = getattr(network, "transformer_blocks", None)
    if blocks is None:
        return [network.mid_block]
    return [blocks[len(blocks) * part // 4] for part in (1, 2, 3)]


class AdversarialLoss(Loss):
    """The hinge loss of a discriminator: the student's side in `term`, the heads' in `follow`."""

    Settings = Adversarial
    settings: Adversarial

    def __init__(self, run: Run, settings: Adversarial):
        super().__init__(run, settings)
        self._pictures, self._layers = run.teacher_pictures, feature_layers(run.models.teachers.network)
        noise, text = run.pairs([0])
        with torch.no_grad():
            maps = self._features(noise, torch.zeros(1, dtype=torch.int64, device=run.models.device), text)
        self.heads = Heads([features.shape[1] if features.ndim == 4 else features.shape[2] for features in maps]).to(run.models.device)
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
        fake, text, t, eps = self._fake(batch.samples)
        logits = self.heads(self._features(self.run.models.schedule.noised(fake, eps, t), t, text))
        return Term(fake, -logits.mean(), {"fooled": (logits > 0).float().mean()})

    def follow(self, step: int, drawn: Mapping[Samples, Tensor], log: Log) -> None:
        log.norms["heads_norm"] = descend(self._weights, drawn, self.heads_loss, self.settings.lr, log)

    def heads_loss(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        """The heads' loss on what the student draws and on the teacher's pictures of the same prompts, and scalars for the log."""
        models = self.run.models
        with torch.no_grad():
            fake, text, t, eps = self._fake(samples)
            real = self._pictures.latents(self._pairs(samples)).to(models.device)
            maps = [self._features(models.schedule.noised(latents, eps, t), t, text) for latents in (fake, real)]
        self.heads.requires_grad_(True)
        fakes, reals = (self.heads(features) for features in maps)
        loss = torch.relu(1 + fakes).mean() + torch.relu(1 - reals).mean()
        return loss, {"heads": loss, "real": (reals > 0).float().mean()}

    def _pairs(self, samples: Samples) -> list[int]:
        recipe = self.run.recipe
        return [shuffled(samples.step * recipe.batch + number, len(self._pictures), recipe.seed + 1) for number in samples.numbers]

    def _fake(self, samples: Samples) -> tuple[Tensor, TextBatch, Tensor, Tensor]:
        """The student's pictures of new noise, their prompts, and the timesteps (B,) and noise with which the discriminator sees them."""
        run, recipe, models = self.run, self.run.recipe, self.run.models
        streams = [generator(recipe.seed, samples.step, number, "judged") for number in samples.numbers]
        noise, eps = torch.stack([torch.randn(2, *models.shape, generator=stream) for stream in streams], 1).to(models.device)
        t = torch.stack([torch.randint(recipe.t_min, recipe.t_max + 1, (), generator=stream) for stream in streams]).to(models.device)
        text = run.prompts.batch([pair % len(run.prompts) for pair in self._pairs(samples)])
        return models.clean(noise, text), text, t, eps

    def _features(self, x_t: Tensor, t: Tensor, text: TextBatch) -> list[Tensor]:
        models = self.run.models
        with self._outputs() as maps, models.teachers.without_adapters() as network:
            # Never the compiled call, which would not see hooks.
            models.denoiser.answer(network, x_t.to(models.dtype), t, text.states, text.mask, None)
        return maps

    @contextmanager
    def _outputs(self) -> Iterator[list[Tensor]]:
        """The layers' outputs in the calls inside."""
        maps: list[Tensor] = []
        hooks = [layer.register_forward_hook(lambda _, __, output: maps.append(output)) for layer in self._layers]
        try:
            yield maps
        finally:
            for hook in hooks:
                hook.remove()
