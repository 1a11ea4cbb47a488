"""Distances of sets of features: known answers."""

import numpy as np
import pytest

from snoopi_rt.export.evaluation.check import plain_frechet, plain_manifold
from snoopi_rt.export.evaluation.statistics import (
    Neighbourhoods,
    bootstrap_deviation,
    bootstrap_mean,
    frechet,
    gaussian_discrepancy,
    precision_recall,
    subset_kernel_distances,
)

RNG = np.random.default_rng(0)


def test_a_set_has_no_distance_to_itself_and_gaussians_have_theirs() -> None:
    few = RNG.standard_normal((30, 200)).astype(np.float32)  # fewer rows than columns, as small sets have
    assert abs(frechet(few, few)) < 1e-3 and gaussian_discrepancy(few, few) == pytest.approx(0, abs=1e-9)
    a, b = RNG.standard_normal((40_000, 4)), 3 * RNG.standard_normal((40_000, 4)) + 2
    assert frechet(a, b) == pytest.approx(4 * 2**2 + 4 * (3 - 1) ** 2, rel=0.02)
    other = RNG.standard_normal((20, 200))
    assert frechet(few, other) == pytest.approx(plain_frechet(few, other), rel=1e-6)


def test_equal_sets_have_all_precision_and_disjoint_ones_none() -> None:
    a, far = RNG.standard_normal((50, 8)), RNG.standard_normal((60, 8)) + 100
    assert precision_recall(a, a) == (1, 1) and precision_recall(a, far) == (0, 0)
    assert Neighbourhoods.of(a, a, 5).covered.all() and not Neighbourhoods.of(a, far, 5).covered.any()


def test_precision_recall_density_and_coverage_are_those_of_pairs_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snoopi_rt.export.evaluation.statistics.ROWS", 7)
    real, made = RNG.standard_normal((25, 3)), RNG.standard_normal((20, 3)) + 0.8
    near, wide = Neighbourhoods.of(real, made, 3), Neighbourhoods.of(real, made, 5)
    ours = [float((near.balls > 0).mean()), float(near.recalled.mean()), float(wide.balls.mean() / 5), float(wide.covered.mean())]
    assert ours == pytest.approx(plain_manifold(made, real))


def test_intervals_hold_what_they_are_of() -> None:
    values = RNG.standard_normal(400) + 5
    low, high = bootstrap_mean(values)
    assert low < values.mean() < high and high - low == pytest.approx(4 * values.std() / 20, rel=0.15)
    rows = RNG.standard_normal((100, 3))
    low, high = bootstrap_deviation(frechet(rows, rows + 1), lambda some: frechet(some, rows + 1), rows)
    assert low < 3 < high and subset_kernel_distances(rows, rows + 1, 5, 50).shape == (5,)
