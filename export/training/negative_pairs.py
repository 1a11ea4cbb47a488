"""Which negative prompts a student must heed and which it must ignore, learned from its own pictures and its teacher.

NASA subtracts every negative, also a bicycle from a picture of a cat, and a network that was never trained with negatives is moved by
that. So pairs of noise and prompt are drawn once and kept, each with the student's own picture; a negative that is in it, with the picture
that the teacher makes of the same noise when it is guided away from that; and a negative that is not in it. The student then learns: the
first negative gives the second picture, the other one changes nothing. Where the prompt can be said without the negative, because that is a
word which the recipe stresses or one of two things that `and` joins, the second picture is the student's own of that shorter prompt: it is
sharp, which a teacher's picture is not after regression, and whole, which one is not that was guided away from a thing. Where nobody asked
for a stressed word, a flaw, the teacher finishes the student's own picture, guided away from it. And where the prompt has a stressed word
the picture without a negative is the teacher's, with more of it.

Whether a negative is in a picture the prompt says where it has the words (but what the whole picture is of nobody wants to leave out), else
the teacher, as a diffusion classifier (Li et al., arXiv 2303.16203): whether it denoises the picture better when told the negative than
when told nothing. It is not in the picture where the difference is above the negative's median; between the two nobody knows. A stressed
word is never taken for absent: the teacher does not call a picture blurry that a student drew too softly. No picture is needed, and no
judge.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from snoopi_rt.export.training.loop import generator
from snoopi_rt.export.training.prompt_files import has_beside_others, has_words, is_of, without
from snoopi_rt.export.training.teacher_pictures import open_array
from snoopi_rt.export.training.text_states import Text, shuffled

if TYPE_CHECKING:
    from snoopi_rt.export.training.distillation import Distillation

LEVELS = (200, 650, 900)
"""The timesteps at which the teacher is asked: flaws are seen at the low ones, colours of a background at the high ones."""
HEEDED = 0.5
"""How often a pair's negative is the one that is in the picture, where there is one."""
ASKED = 0.5
"""How often one of the negatives that are tried is one whose words the prompt has, where there is one."""
FINISHED_FROM, FINISHED_IN, FINISHED_AWAY = 200, 3, 0.8
"""Timesteps that the teacher has to finish a student's picture without a flaw, calls, and how far it is guided away from the flaw at the
largest scale: with more of any it adds grain."""
SLIGHT = -1e-6
"""The score of a flaw that may be there: any other thing that is seen in the picture comes before it."""
LOOKED, AWAY, STRESSED = 1, 2, 4
"""What is drawn of a pair: its plain picture and what is in it, the one without the negative, the one with more of what is stressed."""


class NegativePairs:
    """The pairs of one run, drawn into a folder by the student as it is now; what a stopped run has drawn is kept.

    prompts: of the first pairs; negatives: all. Both in the order of `run.prompts`.
    """

    def __init__(self, run: "Distillation", folder: Path, key: str, prompts: Sequence[str], negatives: Sequence[str]):
        folder.mkdir(parents=True, exist_ok=True)
        self._run, self._folder, self._key, self._prompts, self._negatives = run, folder, key, prompts, negatives
        self._numbers = {text: number for number, text in reversed(list(enumerate(negatives)))}
        self._count = count = run.recipe.negative_pairs
        self._plain, self._away = (open_array(folder / f"{key}-{name}.npy", (count, *run.shape), np.float16) for name in ("plain", "away"))
        choice = (count, run.recipe.negative_choice)
        self._tried = open_array(folder / f"{key}-tried.npy", choice, np.int32)
        self._scores = open_array(folder / f"{key}-scores.npy", choice, np.float32)
        self._done = open_array(folder / f"{key}-done.npy", (count,), np.int8)

    def draw(self) -> None:
        """Draws what is missing: first all plain pictures and what is in them, then what they should be."""
        everywhere = np.ones(self._count, bool)
        self._each(everywhere, LOOKED, self._look, "pairs")
        self.heeded, self.ignored = chosen(self._tried, self._scores, self._negatives)
        self.left_out = np.array([self._can_leave_out(pair, negative) for pair, negative in enumerate(self.heeded.tolist())])
        if self.left_out.any():
            shorter = [self._shortened(pair) for pair in np.flatnonzero(self.left_out).tolist()]
            self._shorter = self._run.prompts.encoded(lambda: shorter, self._key, self._folder / f"{self._key}-shorter")
        self._each(self.left_out, AWAY, self._leave_out, "pictures of the prompt without a negative")
        flaws = np.array([self._is_stress(text) for text in self._negatives])[self.heeded] & (self.heeded >= 0) & ~self.left_out
        self._each(flaws, AWAY, self._finish_away, "pictures finished away from a flaw")
        self._each((self.heeded >= 0) & ~self.left_out & ~flaws, AWAY, self._guide_away, "pictures guided away from a negative")
        if words := self._run.recipe.stressed_words:
            asked = np.array([any(has_words(self._prompt(pair), each) for each in words) for pair in range(self._count)])
            self._each(asked, STRESSED, self._stress, "pictures of stressed words")

    def _each(self, wanted: np.ndarray, what: int, stage: Callable[[np.ndarray], None], name: str) -> None:
        recipe, missing = self._run.recipe, np.flatnonzero(wanted & (self._done & what == 0))
        together = recipe.micro_batch or len(self._run.processes.share(recipe.batch))
        with tqdm(total=len(missing), desc=name, unit="pair", disable=not len(missing)) as bar:
            for start in range(0, len(missing), together):
                places = missing[start : start + together]
                # Always as many, so that no shape changes.
                stage(np.resize(places, together))
                self._done[places] |= what
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
        tried = torch.stack([self._tries(self._prompt(pair), each) for pair, each in zip(pairs.tolist(), random, strict=True)])
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
            prompt, words = self._prompt(pair), [self._negatives[row] for row in rows]
            stressed = [self._is_stress(each) for each in words]
            score[stressed] = score[stressed].clamp(max=SLIGHT)
            score[[has_words(prompt, each) for each in words]] = -torch.inf
            score[[self._is_all(prompt, each) for each in words]] = 0.0  # neither heeded nor ignored
        self._tried[pairs], self._scores[pairs] = tried, scores
        self._plain[pairs] = x0.half().cpu().numpy()

    def _tries(self, prompt: str, random: torch.Generator) -> Tensor:
        """Numbers of some negatives (K,)."""
        tried = torch.randint(len(self._negatives), (self._run.recipe.negative_choice,), generator=random)
        asked = [number for text, number in self._numbers.items() if has_words(prompt, text) and not self._is_all(prompt, text)]
        if asked and torch.rand((), generator=random) < ASKED:
            tried[0] = asked[int(torch.randint(len(asked), (), generator=random))]
        return tried

    @torch.no_grad()
    def _leave_out(self, pairs: np.ndarray) -> None:
        """The student's own pictures of the same noise and the prompt without the negative."""
        run = self._run
        noise, _ = run.given(pairs.tolist())
        rows = self.left_out.cumsum()[pairs] - 1
        shorter = self._shorter.batch(rows.tolist()).to(run.device, run.dtype)
        self._away[pairs] = run.clean(noise, shorter, None).half().cpu().numpy()

    @torch.no_grad()
    def _stress(self, pairs: np.ndarray) -> None:
        """The teacher's pictures, with more of the stressed words than the student would give, as what is wanted without a negative."""
        run = self._run
        unstressed = run.prompts.without_stress(run.prompts.of_pairs(pairs.tolist()))
        drawn = run.teacher_pictures(*run.given(pairs.tolist()), run.recipe.warm_calls, unstressed)
        self._plain[pairs] = drawn.half().cpu().numpy()

    @torch.no_grad()
    def _guide_away(self, pairs: np.ndarray) -> None:
        """The teacher's pictures of the same noise, guided by the prompt less the negative."""
        run, recipe = self._run, self._run.recipe
        away = self._negative(self.heeded[pairs]), recipe.negation * self._share(pairs)
        self._away[pairs] = run.teacher_pictures(*run.given(pairs.tolist()), recipe.warm_calls, away=away).half().cpu().numpy()

    @torch.no_grad()
    def _finish_away(self, pairs: np.ndarray) -> None:
        """The student's own pictures, which the teacher finishes, guided by the prompt less the flaw."""
        run, away = self._run, (self._negative(self.heeded[pairs]), FINISHED_AWAY * self._share(pairs))
        noise, text = run.given(pairs.tolist())
        begun = run.clean(noise, text, None), FINISHED_FROM
        self._away[pairs] = run.teacher_pictures(noise, text, FINISHED_IN, away=away, begun=begun).half().cpu().numpy()

    def _negative(self, rows: np.ndarray) -> Text:
        """The empty prompt where there is none."""
        negative = self._run.prompts.negative(rows.tolist())
        assert negative is not None
        return negative

    def _share(self, pairs: np.ndarray) -> Tensor:
        """Of the largest scale, (B,): more often large than small, since the largest is what is used; all of it for what is left out."""
        drawn = [1.0 if self.left_out[pair] else _draw(self._run, "scale of a pair", int(pair)) ** 0.5 for pair in pairs]
        return torch.tensor(drawn, device=self._run.device)

    def _prompt(self, pair: int) -> str:
        return self._prompts[pair % len(self._prompts)]

    def _is_stress(self, words: str) -> bool:
        return words in self._run.recipe.stressed_words

    def _is_all(self, prompt: str, words: str) -> bool:
        """Whether nothing would be left to draw without this negative."""
        return is_of(prompt, words) and not self._is_stress(words)

    def _can_leave_out(self, pair: int, negative: int) -> bool:
        prompt, words = self._prompt(pair), self._negatives[negative]
        return negative >= 0 and has_words(prompt, words) and (self._is_stress(words) or has_beside_others(prompt, words))

    def _shortened(self, pair: int) -> str:
        return without(self._prompt(pair), [self._negatives[self.heeded[pair]]])


def chosen(tried: np.ndarray, scores: np.ndarray, negatives: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of each pair the negative that is in its picture, the one with the lowest score where that is below 0, and one that is not: the first
    with a score above the median of that negative's. Numbers of negatives (P,), -1 where there is none.

    tried, scores: (P, K), numbers of negatives and their scores, minus infinity for what the prompt asks for, 0 for what is neither.
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
