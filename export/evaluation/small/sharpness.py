"""How near whole sets of images are to real ones, how much fine detail they have, and pixel metrics."""

from collections.abc import Iterator

from snoopi_rt.export.evaluation import pixel_metrics
from snoopi_rt.export.evaluation.report import Goal, ReportRow, share
from snoopi_rt.export.evaluation.samplers import Sampler
from snoopi_rt.export.evaluation.small.domain import Domain
from snoopi_rt.export.evaluation.statistics import frechet, kernel_distance, precision_recall, ratio_interval
from snoopi_rt.export.small_model.dataset.scene import plain_caption

FRECHET = "Frechet distance to real pictures"
MANIFOLD = 2000
"""Images of each set whose precision and recall are taken: all pairs of them are compared."""


def sharpness(sampler: Sampler, domain: Domain, samples: int, teacher: float | None = None) -> Iterator[ReportRow]:
    """Figures of images of random scenes as the training set has them. teacher: its Frechet distance, of as many images."""
    scenes = domain.scenes(samples, seed=11)
    made = sampler([plain_caption(scene) for scene in scenes], list(range(len(scenes))))
    real = domain.real(scenes, made.shape[1], seed=12)
    ours, theirs = domain.judge.features(made).numpy(), domain.real_features(scenes, made.shape[1], seed=12).numpy()
    # What other real images reach stands beside the teacher, whose figures are kept: it is the same for all.
    other = domain.real_features(scenes, made.shape[1], seed=13).numpy() if sampler.kind == "teacher" else None
    distance = frechet(ours, theirs)
    detail = {} if other is None else {"of real pictures": frechet(other, theirs)}
    yield ReportRow("sharpness", FRECHET, distance, unit="judge features", of=samples, detail=detail)
    if teacher is not None:
        yield ReportRow("sharpness", "Frechet distance", distance / teacher, Goal(most=1.25), "of the teacher's", of=samples)
    clean = [i for i, scene in enumerate(scenes) if scene.flaw is None]
    detail_made, detail_real = (pixel_metrics.fine_detail(pictures[clean]) for pictures in (made, real))
    ratio, goal = float(detail_made.sum() / detail_real.sum()), Goal(0.8, 1.2) if sampler.kind == "student" else None
    interval = ratio_interval(detail_made, detail_real)
    yield ReportRow("sharpness", "fine-detail energy", ratio, goal, "of real pictures'", of=len(clean), interval=interval)
    section = "history, no goals"
    few = [features[:MANIFOLD] for features in (theirs, ours)]
    names = {"kid": kernel_distance(ours, theirs)}
    if other is not None:
        names["kid of real"] = kernel_distance(other, theirs)
    names |= zip(("precision", "recall"), precision_recall(*few), strict=True)
    for name, value in names.items():
        yield ReportRow(section, name, float(value), unit="judge features", of=samples)
    limits = domain.limits(made.shape[1])
    for flaw in pixel_metrics.FLAWS:
        yield share(section, f"{flaw}, unasked", limits.shows(made[clean], flaw), error=limits.errors[flaw])
