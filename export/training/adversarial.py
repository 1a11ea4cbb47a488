"""A discriminator in latent space, for a student that is to be as sharp as its teacher: heads on the frozen teacher's own features.

Real ones are the teacher's pictures of the same prompts, so that no image is needed. Both are noised before the teacher sees them, as in
LADD (Sauer et al. 2024) and DMD2 (Yin et al. 2024).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from snoopi_rt.export.training.loop import generator
from snoopi_rt.export.training.text_states import Text, shuffled

if TYPE_CHECKING:
    from snoopi_rt.export.training.distillation import Distillation

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
        return torch.cat([head(each.float()).squeeze(-1) for head, each in zip(self.heads, tokens, strict=True)], 1)


def feature_layers(network: nn.Module) -> list[nn.Module]:
    """Where the features are taken: at three depths of a transformer, in the middle of a UNet."""
    blocks = getattr(network, "transformer_blocks", None)
    if blocks is None:
        return [network.mid_block]
    return [blocks[len(blocks) * part // 4] for part in (1, 2, 3)]


class Discriminator:
    """The heads of one run, and the two losses."""

    def __init__(self, run: "Distillation"):
        assert run.pictures is not None  # Task.check
        self._run, self._pictures = run, run.pictures
        self._layers = feature_layers(run.teachers.network)
        noise, text = run.given([0])
        with torch.no_grad():
            maps = self._features(noise, torch.zeros(1, dtype=torch.int64, device=run.device), text)
        self.heads = Heads([features.shape[1] if features.ndim == 4 else features.shape[2] for features in maps]).to(run.device)

    def student_loss(self, step: int, samples: range) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Clean latents (B, C, h, w) of the student, and how far they are from being taken for real."""
        self.heads.requires_grad_(False)
        fake, text, t, eps = self._fake(step, samples)
        logits = self.heads(self._features(self._run.schedule.noised(fake, eps, t), t, text))
        loss = -logits.mean()
        return fake, loss, {"fooled": (logits > 0).float().mean()}

    def heads_loss(self, step: int, samples: range) -> tuple[Tensor, dict[str, Tensor]]:
        """The hinge loss of the heads, on what the student draws and on the teacher's pictures of the same prompts."""
        run = self._run
        with torch.no_grad():
            fake, text, t, eps = self._fake(step, samples)
            real = self._pictures.latents(self._pairs(step, samples))
            maps = [self._features(run.schedule.noised(latents, eps, t), t, text) for latents in (fake, real)]
        self.heads.requires_grad_(True)
        fakes, reals = (self.heads(features) for features in maps)
        loss = torch.relu(1 + fakes).mean() + torch.relu(1 - reals).mean()
        return loss, {"heads": loss, "real": (reals > 0).float().mean()}

    def _pairs(self, step: int, samples: range) -> list[int]:
        recipe = self._run.recipe
        return [shuffled(step * recipe.batch + sample, recipe.warm_pairs, recipe.seed + 1) for sample in samples]

    def _fake(self, step: int, samples: range) -> tuple[Tensor, Text, Tensor, Tensor]:
        """The student's pictures of new noise, their prompts, and the timesteps (B,) and noise at which they are judged."""
        run, recipe = self._run, self._run.recipe
        random = [generator(recipe.seed, step, sample, "judged") for sample in samples]
        noise, eps = torch.stack([torch.randn(2, *run.shape, generator=each) for each in random], 1).to(run.device)
        t = torch.stack([torch.randint(recipe.t_min, recipe.t_max + 1, (), generator=each) for each in random]).to(run.device)
        text = run.prompts.batch(run.prompts.of_pairs(self._pairs(step, samples)))
        return run.clean(noise, text, None), text, t, eps

    def _features(self, x_t: Tensor, t: Tensor, text: Text) -> list[Tensor]:
        run = self._run
        with self._listening() as maps, run.teachers.without_adapters() as network:
            # Never the compiled one, which would not look at hooks.
            run.denoiser.answer(network, x_t.to(run.dtype), t, text.states, text.mask, None)
        return maps

    @contextmanager
    def _listening(self) -> Iterator[list[Tensor]]:
        """The layers' outputs of the calls inside."""
        maps: list[Tensor] = []
        hooks = [layer.register_forward_hook(lambda _, __, output: maps.append(output)) for layer in self._layers]
        try:
            yield maps
        finally:
            for hook in hooks:
                hook.remove()
