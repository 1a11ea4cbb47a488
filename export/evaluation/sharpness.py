"""How near whole sets of pictures are to real ones, how much fine detail they have, and pixel metrics."""

from collections.abc import Iterator

import numpy as np

from snoopi_rt.export.evaluation import pixel_metrics
from snoopi_rt.export.evaluation.domain import Domain
from snoopi_rt.export.evaluation.report import Goal, Row, share
from snoopi_rt.export.evaluation.samplers import Sampler
from snoopi_rt.export.evaluation.statistics import frechet, kernel_distance, precision_recall, ratio_interval
from snoopi_rt.export.small_model.dataset.scene import plain_caption

FRECHET = "Frechet distance to real pictures"
MANIFOLD = 2000
"""Pictures of each set whose precision and recall are taken: all pairs of them are compared."""


def sharpness(sampler: Sampler, domain: Domain, samples: int, teacher: float | None = None) -> Iterator[Row]:
    """Figures of pictures of random scenes as the training set has them. teacher: its Frechet distance, of as many pictures."""
    scenes = domain.scenes(samples, seed=11)
    made = sampler([plain_caption(scene) for scene in scenes], list(range(len(scenes))))
    real = domain.real(scenes, made.shape[1], seed=12)
    features = [domain.judge.features(pictures).numpy() for pictures in (made, real, domain.real(scenes, made.shape[1], seed=13))]
    distance = frechet(features[0], features[1])
    yield Row(
        "sharpness", FRECHET, distance, unit="judge features", of=samples, detail={"of real pictures": frechet(features[2], features[1])}
    )
    if teacher is not None:
        yield Row("sharpness", "Frechet distance", distance / teacher, Goal(most=1.25), "of the teacher's", of=samples)
    clean = [i for i, scene in enumerate(scenes) if scene.flaw is None]
    ours, theirs = (pixel_metrics.fine_detail(pictures[clean]) for pictures in (made, real))
    ratio, goal = float(ours.sum() / theirs.sum()), Goal(0.8, 1.2) if sampler.kind == "student" else None
    interval = ratio_interval(ours, theirs)
    yield Row("sharpness", "fine-detail energy", ratio, goal, "of real pictures'", of=len(clean), interval=interval)
    yield from _history(domain, made[clean], features)


def _history(domain: Domain, clean: np.ndarray, features: list[np.ndarray]) -> Iterator[Row]:
    section = "history, no goals"
    made, real, other = features
    few = [rows[:MANIFOLD] for rows in (real, made)]
    names = {"kid": kernel_distance(made, real), "kid of real": kernel_distance(other, real)}
    names |= zip(("precision", "recall"), precision_recall(*few), strict=True)
    for name, value in names.items():
        yield Row(section, name, float(value), unit="judge features", of=len(made))
    limits = domain.limits(clean.shape[1])
    for flaw in pixel_metrics.FLAWS:
        yield share(section, f"{flaw}, unasked", limits.shows(clean, flaw), error=limits.errors[flaw])
