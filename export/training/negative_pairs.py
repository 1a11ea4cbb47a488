"""Which negative prompts a student must heed and which it must ignore, learned from its own pictures and its teacher.

NASA subtracts every negative, also a bicycle from a picture of a cat, and a network that was never trained with negatives is moved by
that. So pairs of noise and prompt are drawn once and kept, each with the student's own picture; a negative that is in it, with the picture
that the teacher makes of the same noise when it is guided away from that; and a negative that is not in it. The student then learns: the
first negative gives the second picture, the other one changes nothing.

Whether a negative is in a picture the prompt says where it has the words, else the teacher, as a diffusion classifier (Li et al.,
arXiv 2303.16203): whether it denoises the picture better when told the negative than when told nothing. It is not in the picture where the
difference is above the negative's median; between the two nobody knows. No picture is needed, and no judge.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from snoopi_rt.export.training.loop import generator
from snoopi_rt.export.training.teacher_pictures import open_array
from snoopi_rt.export.training.text_states import Text, shuffled

if TYPE_CHECKING:
    from snoopi_rt.export.training.distillation import Distillation

LEVELS = (200, 650, 900)
"""The timesteps at which the teacher is asked: flaws are seen at the low ones, colours of a background at the high ones."""
HEEDED = 0.75
"""How often a pair's negative is the one that is in the picture, where there is one."""


class NegativePairs:
    """The pairs of one run, drawn into a folder by the student as it is now; what a stopped run has drawn is kept.

    prompts: those of the first pairs, in the order of `run.texts`; negatives: those of `run.negatives`.
    """

    def __init__(self, run: "Distillation", folder: Path, key: str, prompts: Sequence[str], negatives: Sequence[str]):
        folder.mkdir(parents=True, exist_ok=True)
        self._run, self._prompts, self._negatives = run, prompts, negatives
        self._count = count = run.recipe.negative_pairs
        self._plain, self._away = (open_array(folder / f"{key}-{name}.npy", (count, *run.shape), np.float16) for name in ("plain", "away"))
        choice = (count, run.recipe.negative_choice)
        self._tried = open_array(folder / f"{key}-tried.npy", choice, np.int32)
        self._scores = open_array(folder / f"{key}-scores.npy", choice, np.float32)
        self._done = open_array(folder / f"{key}-done.npy", (count,), np.int8)

    def draw(self) -> None:
        """Draws what is missing: first all plain pictures and what is in them, then those of the teacher."""
        self._each(np.flatnonzero(self._done == 0), self._look, "pairs")
        self.heeded, self.ignored = chosen(self._tried, self._scores, self._negatives)
        self._each(np.flatnonzero((self._done == 1) & (self.heeded >= 0)), self._guide_away, "pictures without a negative")

    def _each(self, missing: np.ndarray, stage: Callable[[np.ndarray], None], name: str) -> None:
        recipe = self._run.recipe
        together = recipe.micro_batch or len(self._run.processes.share(recipe.batch))
        with tqdm(total=len(missing), desc=name, unit="pair", disable=not len(missing)) as bar:
            for start in range(0, len(missing), together):
                places = missing[start : start + together]
                # Always as many, so that no shape changes.
                stage(np.resize(places, together))
                self._done[places] += 1
                bar.update(len(places))

    def loss(self, step: int, samples: range) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Clean latents (B, C, h, w) without a negative, the loss, and the mean squared distances that it is made of."""
        run, first = self._run, step * self._run.recipe.batch
        pairs = np.array([shuffled(first + sample, self._count, run.recipe.seed) for sample in samples])
        heed = np.array([_draw(run, "heed", step, sample) < HEEDED for sample in samples]) & (self.heeded[pairs] >= 0)
        rows = np.where(heed, self.heeded[pairs], self.ignored[pairs])
        noise, text = run.given(pairs.tolist())
        plain, away = (torch.from_numpy(kept[pairs]).float().to(run.device) for kept in (self._plain, self._away))
        heeded = torch.from_numpy(heed).to(run.device)
        x0 = run.clean(noise, text, None)
        guided = run.clean(noise, text, (self._negative(rows), run.recipe.nasa_max * self._share(pairs)))
        wanted = torch.where(heeded.view(-1, 1, 1, 1), away, plain)
        own, distance = (x0 - plain).square().mean(), (guided - wanted).square().mean((1, 2, 3))
        parts = {name: (distance * chosen).sum() / chosen.sum().clamp(min=1) for name, chosen in (("heeded", heeded), ("ignored", ~heeded))}
        return x0, own + distance.mean(), {"kept": own, **parts}

    @torch.no_grad()
    def _look(self, pairs: np.ndarray) -> None:
        """The student's pictures, and how well the teacher recognises some negatives in them: the lower, the better."""
        run, recipe = self._run, self._run.recipe
        noise, text = run.given(pairs.tolist())
        x0 = run.clean(noise, text, None)
        random = [generator(recipe.seed, "negatives of a pair", int(pair)) for pair in pairs]
        tried = torch.stack([torch.randint(len(self._negatives), (recipe.negative_choice,), generator=each) for each in random])
        errors = torch.zeros(recipe.negative_choice + 1, len(pairs), device=run.device)
        with run.teachers.frozen() as network:
            for level in LEVELS:
                t = torch.full((len(pairs),), level, device=run.device)
                eps = torch.stack([torch.randn(run.shape, generator=each) for each in random]).to(run.device)
                x_t, target = run.schedule.noised(x0, eps, t), run.schedule.target(x0, eps, t)
                for error, rows in zip(errors, [torch.full((len(pairs),), -1), *tried.T], strict=True):
                    error += (run.say(network, x_t, t, self._negative(rows.numpy())) - target).square().mean((1, 2, 3))
        scores = (errors[1:] - errors[0]).T.cpu()
        for pair, rows, score in zip(pairs.tolist(), tried.tolist(), scores, strict=True):
            prompt = self._prompts[pair % len(self._prompts)]
            score[[_has_words(prompt, self._negatives[row]) for row in rows]] = -torch.inf
        self._tried[pairs], self._scores[pairs] = tried, scores
        self._plain[pairs] = x0.half().cpu().numpy()

    @torch.no_grad()
    def _guide_away(self, pairs: np.ndarray) -> None:
        """The teacher's pictures of the same noise, guided by the prompt less the negative."""
        run, recipe = self._run, self._run.recipe
        away = self._negative(self.heeded[pairs]), recipe.negation * self._share(pairs)
        self._away[pairs] = run.teacher_pictures(*run.given(pairs.tolist()), recipe.warm_calls, away).half().cpu().numpy()

    def _negative(self, rows: np.ndarray) -> Text:
        """The empty prompt where there is none."""
        assert self._run.negatives is not None
        return self._run.negatives.batch(rows.tolist()).to(self._run.device, self._run.dtype)

    def _share(self, pairs: np.ndarray) -> Tensor:
        """Of the largest scale, (B,): more often large than small, since the largest is what is used."""
        return torch.tensor([_draw(self._run, "scale of a pair", int(pair)) ** 0.5 for pair in pairs], device=self._run.device)


def chosen(tried: np.ndarray, scores: np.ndarray, negatives: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of each pair the negative that is in its picture, the one with the lowest score where that is below 0, and one that is not: the first
    with a score above the median of that negative's. Numbers of negatives (P,), -1 where there is none.

    tried, scores: (P, K), numbers of negatives and their scores, minus infinity for what the prompt asks for.
    """
    first = {text: number for number, text in reversed(list(enumerate(negatives)))}
    kinds = np.array([first[text] for text in negatives])[tried]
    medians = np.zeros(len(negatives))
    for kind in np.unique(kinds):
        medians[kind] = max(0.0, float(np.median(scores[kinds == kind])))
    lowest, outside = scores.argmin(1)[:, None], scores > medians[kinds]
    heeded = np.where(scores.min(1) < 0, np.take_along_axis(tried, lowest, 1)[:, 0], -1)
    ignored = np.where(outside.any(1), np.take_along_axis(tried, outside.argmax(1)[:, None], 1)[:, 0], -1)
    return heeded, ignored


def _draw(run: "Distillation", *place: int | str) -> float:
    """From U(0, 1)."""
    return torch.rand((), generator=generator(run.recipe.seed, *place)).item()


def _has_words(prompt: str, negative: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(negative)}(?!\w)", prompt, re.IGNORECASE) is not None
