"""Does one see what was asked for? Every thing by its bare name, beside what real drawings of it reach."""

from collections.abc import Iterator

import numpy as np

from snoopi_rt.export.evaluation.report import ReportRow, share
from snoopi_rt.export.evaluation.samplers import Sampler
from snoopi_rt.export.evaluation.small.domain import Domain
from snoopi_rt.export.evaluation.small.judge import TOP
from snoopi_rt.export.small_model.dataset.scene import Scene, plain_caption

GOALS: dict[str, dict[str, float | None]] = {"student": {"common": 0.85, "all": 0.75}, "teacher": {"common": 0.90, "all": None}}
"""Of the ceiling."""


def recognition(sampler: Sampler, domain: Domain, seeds: int) -> Iterator[ReportRow]:
    """Shares of images whose thing is the judge's first, or among its first, and of things that one of their images shows."""
    names = [name for name in domain.names for _ in range(seeds)]
    pictures = sampler([plain_caption(Scene((name,))) for name in names], list(range(len(names))))
    ranks = domain.judge.ranks(domain.judge.features(pictures), names).reshape(-1, seeds)
    ceiling = domain.judge.ceiling()
    for group, members in (("common", domain.common), ("all", domain.names)):
        places = [domain.names.index(name) for name in members]
        for top in (1, TOP):
            goal = GOALS[sampler.kind][group]
            yield share(
                "recognition", f"top {top}, {group} things", ranks[places].ravel() < top, goal, float((ceiling[places] < top).mean())
            )
    clear = np.flatnonzero(ceiling < TOP)
    seen = np.any(ranks[clear] < TOP, axis=1)
    missing = [domain.names[i] for i in clear[~seen]]
    goal = 1.0 if sampler.kind == "student" else None
    yield share("recognition", f"things whose drawing is in the top {TOP}, in one of {seeds} seeds", seen, goal, missing=missing)
