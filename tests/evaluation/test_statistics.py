"""Statistics against independent computations, and the rows and tables of a report."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import linalg, spatial

from snoopi_rt.export.evaluation.harm import Harm, Seen
from snoopi_rt.export.evaluation.report import Goal, ReportRow, markdown, mean, share
from snoopi_rt.export.evaluation.statistics import (
    bootstrap_mean,
    frechet,
    kernel_distance,
    mean_interval,
    precision_recall,
    ratio_interval,
    relative_interval,
    share_interval,
)

# Statistics, each computed another way.


def test_the_frechet_distance_is_the_formula_with_a_matrix_root() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((60, 5)), rng.standard_normal((80, 5)) @ rng.standard_normal((5, 5)) + 1
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(first @ second).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet(a.astype(np.float32), a.astype(np.float32)) == pytest.approx(0, abs=1e-6)
    few = rng.standard_normal((4, 5))  # fewer rows than columns
    assert np.isfinite(frechet(few, b)) and frechet(few, few + 3) == pytest.approx(45, rel=1e-4)


def test_images_of_one_prompt_count_as_one_in_the_interval_of_a_mean() -> None:
    prompts = np.random.default_rng(0).standard_normal(30)
    seeds = np.tile(prompts, 4)  # what does not change with the seed tells no more in four images than in one
    row = mean("section", "name", seeds, "points", rounds=4)
    assert row.value == pytest.approx(prompts.mean()) and row.of == 120
    assert row.interval == pytest.approx(mean_interval(prompts))
    assert mean("section", "name", seeds[:4], "points", rounds=4).interval is None


def test_images_of_one_prompt_count_as_one_in_the_intervals_of_harm() -> None:
    rng = np.random.default_rng(0)
    recognised, features, across, beside = rng.random(30) < 0.5, rng.standard_normal((30, 2)), rng.random(30) + 1, rng.random(30) + 1
    intervals = []
    for rounds in (1, 4):
        seen = Seen(*(np.concatenate([part] * rounds) for part in (recognised, features, across, beside)))
        plain = replace(seen, recognised=np.zeros(len(seen.recognised)))
        rows = Harm(plain, seen.features, rounds).rows("section", "label", seen, Goal(-1, 1))
        intervals.append([row.interval for row in rows if row.interval])
    assert len(intervals[0]) == 2 and np.allclose(*intervals)


def test_blockiness_is_compared_image_by_image() -> None:
    rng = np.random.default_rng(0)
    across, beside, same = rng.random(50) + 0.1, rng.random(50) + 0.1, np.zeros((50, 2))
    plain = Seen(np.zeros(50), same, across, beside)
    # Images differ much from each other, but each by the same from itself under the negative.
    row = list(Harm(plain, same).rows("section", "label", replace(plain, across=1.002 * across), Goal(-1, 1)))[-1]
    assert row.name == "label, blockiness" and (row.value, *row.interval) == pytest.approx((1.002,) * 3)
    assert row.met is False


def test_the_kernel_distance_is_the_mean_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((7, 3)), rng.standard_normal((5, 3)) + 1

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 3 + 1) ** 3)

    expected = np.mean([k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    expected += np.mean([k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    expected -= 2 * np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(expected)


def test_precision_and_recall_are_those_of_balls_to_the_third_neighbour() -> None:
    rng = np.random.default_rng(0)
    real, made = rng.standard_normal((60, 2)), 0.5 * rng.standard_normal((50, 2)) + 0.7

    def covered(points: np.ndarray, by: np.ndarray) -> float:
        radius = spatial.KDTree(by).query(by, 4)[0][:, 3]
        return float(np.mean([(np.linalg.norm(by - point, axis=1) <= radius).any() for point in points]))

    assert precision_recall(real, made) == pytest.approx((covered(made, real), covered(real, made)))


def test_intervals_hold_what_they_should() -> None:
    assert share_interval(0, 0) == (0, 1) and share_interval(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)  # Wilson's formula
    assert share_interval(0, 300) == pytest.approx((0, 3.8415 / 303.8415), abs=1e-6)
    values = np.random.default_rng(0).normal(3, 2, 400)
    half = 1.959964 * values.std(ddof=1) / 20
    assert mean_interval(values) == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-6)
    assert mean_interval(np.ones(4)) == (1, 1)
    assert bootstrap_mean(values) == pytest.approx(mean_interval(values), rel=0.01)
    wholes = values + 20
    drawn = np.random.default_rng(1).integers(400, size=(4000, 400))
    expected = np.percentile(values[drawn].sum(1) / wholes[drawn].sum(1), [2.5, 97.5])
    assert ratio_interval(values, wholes) == pytest.approx(tuple(expected), rel=0.02)
    other, rest = values**2, wholes + values
    expected = np.percentile(values[drawn].sum(1) / wholes[drawn].sum(1) / (other[drawn].sum(1) / rest[drawn].sum(1)), [2.5, 97.5])
    assert relative_interval((values, wholes), (other, rest)) == pytest.approx(tuple(expected), rel=0.02)
    assert ratio_interval(values[:1], wholes[:1]) == pytest.approx((values[0] / wholes[0],) * 2)


# Rows and tables.


def test_a_goal_that_could_not_be_measured_is_missed() -> None:
    assert [Goal(least=0.5).met(value) for value in (None, float("nan"), 0.49, 0.5)] == [False, False, False, True]
    assert Goal(0.8, 1.2).met(1.0) and not Goal(0.8, 1.2).met(1.3) and str(Goal(0.8, 1.2)) == "0.8 to 1.2"
    assert share("a", "b", np.zeros(0, bool), 0.9).met is False and mean("a", "b", np.zeros(0), "levels", Goal(most=3)).met is False


def test_a_share_is_relative_to_its_ceiling_and_so_is_its_interval() -> None:
    row = share("a", "b", np.arange(10) < 4, 0.75, ceiling=0.5)
    assert (row.value, row.count, row.of, row.met) == (0.8, 4, 10, True)
    assert row.interval == pytest.approx(tuple(2 * np.array(share_interval(4, 10))))


def test_the_table_has_a_line_per_figure_and_a_column_per_who_is_judged() -> None:
    ours = [share("eyes", "two", np.ones(4, bool), 0.9), ReportRow("cost", "an image", 30.0, Goal(most=25), "ms")]
    ours.append(mean("eyes", "depth", np.array([1.0, 3.0]), "levels", missing=["left"], of_real=2.5))
    lines = markdown({"ours": ours, "theirs": ours[:1]}).splitlines()
    assert lines[0] == "| measure | goal | ours | theirs | ceiling | counter's error |" and len(lines) == 7
    assert lines[-1] == "- ours, eyes: depth: missing 'left', of_real 2.5"
    assert "| ≥ 0.9 | 1 (4/4) [0.51, 1] met |" in lines[2] and lines[3] == "| cost: an image, ms | ≤ 25 | 30 **missed** |  |  |  |"
