"""What images amount to in numbers: shares and means with 95 % intervals, and distances between sets of features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import stats

NEIGHBOURS = 3
"""Kynkaanniemi et al. 2019 as OpenAI's evaluator runs it: a set's manifold is the balls to the third neighbour."""
LEVEL = 0.95
"""Of all confidence intervals."""
DEVIATIONS = stats.norm.ppf(0.5 + LEVEL / 2)
"""Of a normal distribution that hold so much of it."""
RESAMPLES = 2000
"""Of a bootstrap."""
SUBSET = 1000
"""Images of each subset whose KID is taken (Binkowski et al. 2018)."""
ROWS = 1000
"""Rows that are compared with all others at once: all pairs of a large set take tens of gigabytes."""


Item = TypeVar("Item")


def spread(items: Sequence[Item], count: int | None) -> list[Item]:
    """At most so many of the items, evenly over all; None: all."""
    return list(items) if count is None or count >= len(items) else [items[i * len(items) // count] for i in range(count)]


@dataclass(frozen=True)
class Gaussian:
    """Features (N, D) as a normal distribution: their mean, and R with R.T @ R = covariance."""

    mean: np.ndarray
    root: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray) -> "Gaussian":
        rows = np.asarray(rows, np.float64)
        mean = rows.mean(0)
        return cls(mean, np.asarray(np.linalg.qr((rows - mean) / np.sqrt(len(rows) - 1), mode="r")))

    def distance(self, other: "Gaussian") -> float:
        """The Frechet distance (Heusel et al. 2017): the trace of the root of the covariances' product is the sum of the singular values
        of R_a @ R_b.T. Nothing is lost if there are fewer rows than columns, as it is in the product's own eigenvalues."""
        apart = self.mean - other.mean
        cross = np.linalg.svd(self.root @ other.root.T, compute_uv=False).sum()
        return float(apart @ apart + (self.root**2).sum() + (other.root**2).sum() - 2 * cross)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance of two sets of features (N, D) and (M, D), taken as Gaussians.

    Sets smaller than about D make it larger than it is: compare only distances of sets of one size.
    """
    return Gaussian.of(a).distance(Gaussian.of(b))


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The squared maximum mean discrepancy of a cubic kernel, unbiased (KID, Binkowski et al. 2018), over all rows at once."""
    n, m = len(a), len(b)
    own = [(rows @ rows.T / rows.shape[1] + 1) ** 3 for rows in (a, b)]
    inside = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in own)
    return float(inside - 2 * ((a @ b.T / a.shape[1] + 1) ** 3).sum() / (n * m))


def subset_kernel_distances(a: np.ndarray, b: np.ndarray, subsets: int = 100, size: int = SUBSET) -> np.ndarray:
    """KID of random subsets of that size, drawn without replacement (Binkowski et al. 2018), (subsets,)."""
    rng, size = np.random.RandomState(2020), min(size, len(a), len(b))
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    few = ((rows[rng.choice(len(rows), size, replace=False)] for rows in (a, b)) for _ in range(subsets))
    return np.array([kernel_distance(*pair) for pair in few])


@dataclass(frozen=True)
class Neighbourhoods:
    """Which features lie in which balls to the k-th neighbour. balls: in how many real ones each made one lies, (N,); covered: whether
    each real ball holds a made one, recalled: whether each real one lies in a made ball, (M,)."""

    balls: np.ndarray
    covered: np.ndarray
    recalled: np.ndarray

    @classmethod
    def of(cls, real: np.ndarray, made: np.ndarray, k: int = NEIGHBOURS) -> "Neighbourhoods":
        real, made = np.asarray(real, np.float64), np.asarray(made, np.float64)
        radius_real, radius_made = _radii(real, k), _radii(made, k)
        balls, covered, recalled = [], np.zeros(len(real), bool), np.zeros(len(real), bool)
        for start in range(0, len(made), ROWS):
            between = _distances(made[start : start + ROWS], real)
            inside = between <= radius_real
            balls.append(inside.sum(1))
            covered |= inside.any(0)
            recalled |= (between <= radius_made[start : start + ROWS, None]).any(0)
        return cls(np.concatenate(balls), covered, recalled)


def precision_recall(real: np.ndarray, made: np.ndarray) -> tuple[float, float]:
    """The share of made features inside the manifold of the real ones, and the other way round (Kynkaanniemi et al. 2019)."""
    neighbourhoods = Neighbourhoods.of(real, made)
    return float((neighbourhoods.balls > 0).mean()), float(neighbourhoods.recalled.mean())


def gaussian_discrepancy(a: np.ndarray, b: np.ndarray, sigma: float = 10.0) -> float:
    """1000 times the squared maximum mean discrepancy of a Gaussian kernel, with each row's own term (CMMD, Jayasumana et al. 2024)."""

    def similarity(x: np.ndarray, y: np.ndarray) -> float:
        parts = (np.exp(-(_distances(x[i : i + ROWS], y) ** 2) / (2 * sigma * sigma)).sum() for i in range(0, len(x), ROWS))
        return float(sum(parts)) / (len(x) * len(y))

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return 1000 * (similarity(a, a) + similarity(b, b) - 2 * similarity(a, b))


def share_interval(successes: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson score); the images are taken as independent."""
    if of == 0:
        return 0.0, 1.0
    interval = stats.binomtest(successes, of).proportion_ci(LEVEL, "wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean of at least two values (normal approximation)."""
    half = DEVIATIONS * stats.sem(values)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def ratio_interval(parts: np.ndarray, wholes: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of sum(parts) / sum(wholes), both (N,), over pairs drawn again with replacement (bootstrap)."""
    return _bootstrap((parts, wholes), lambda a, b, axis: a.sum(axis) / b.sum(axis))


def relative_interval(ratio: tuple[np.ndarray, np.ndarray], to: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """The 95 % interval of one ratio of sums to another, of parts and wholes (N,) of the same N images, which are drawn again together."""
    return _bootstrap((*ratio, *to), lambda a, b, c, d, axis: (a.sum(axis) / b.sum(axis)) / (c.sum(axis) / d.sum(axis)))


def bootstrap_mean(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of one value per image, (N,): percentiles over images drawn again with replacement."""
    return _bootstrap((np.asarray(values, np.float64),), np.mean)


def _bootstrap(samples: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray]) -> tuple[float, float]:
    if len(samples[0]) < 2:  # of which scipy takes none
        return (value := float(statistic(*samples, axis=-1))), value
    # In batches: all resamples of 30,000 images take gigabytes.
    settings = {"n_resamples": RESAMPLES, "batch": 50, "confidence_level": LEVEL, "method": "percentile", "rng": 0}
    interval = stats.bootstrap(samples, statistic, paired=True, vectorized=True, **settings).confidence_interval
    return float(interval.low), float(interval.high)


def bootstrap_deviation(
    value: float, statistic: Callable[[np.ndarray], float], rows: np.ndarray, resamples: int = 20
) -> tuple[float, float]:
    """The 95 % interval of statistic(rows), `value`: by the deviation over rows drawn again with replacement.

    Not by percentiles: rows that are there twice make a distance larger than it is, and few resamples do for a deviation.
    """
    rng = np.random.default_rng(0)
    return deviation_interval(value, np.array([statistic(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(resamples)]))


def deviation_interval(value: float, estimates: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a value from the deviation of its estimates on parts of the images."""
    half = DEVIATIONS * np.std(estimates, ddof=1)
    return float(value - half), float(value + half)


def _radii(rows: np.ndarray, k: int) -> np.ndarray:
    """The distance of each row to its k-th neighbour; to the farthest if there are fewer."""
    k = min(k, len(rows) - 1)
    parts = (_distances(rows[start : start + ROWS], rows) for start in range(0, len(rows), ROWS))
    return np.concatenate([np.partition(part, k, axis=1)[:, k] for part in parts])


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    return np.sqrt(np.clip(squared, 0, None))
