"""What pictures amount to in numbers: shares and means with 95 % intervals, and distances between sets of features."""

import numpy as np

NEIGHBOURS = 3
"""Kynkaanniemi et al. 2019 as OpenAI's evaluator runs it: a set's manifold is the balls to the third neighbour."""
Z = 1.959964
"""Deviations of a normal distribution that hold 95 % of it."""


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance of two sets of features (N, D) and (M, D), taken as Gaussians (Heusel et al. 2017).

    Sets smaller than about D make it larger than it is: compare only distances of sets of one size.
    """
    a, b = (np.asarray(rows, np.float64) for rows in (a, b))
    mean = a.mean(0) - b.mean(0)
    # Triangles with R.T @ R = covariance: the trace of the root of the covariances' product is the sum of R_a @ R_b.T's singular values.
    first, second = (np.asarray(np.linalg.qr((rows - rows.mean(0)) / np.sqrt(len(rows) - 1), mode="r")) for rows in (a, b))
    cross = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    return float(mean @ mean + (first**2).sum() + (second**2).sum() - 2 * cross)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The squared maximum mean discrepancy of a cubic kernel, unbiased (KID, Binkowski et al. 2018), over all rows at once."""
    n, m = len(a), len(b)
    own = [(rows @ rows.T / rows.shape[1] + 1) ** 3 for rows in (a, b)]
    inside = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in own)
    return float(inside - 2 * ((a @ b.T / a.shape[1] + 1) ** 3).sum() / (n * m))


def precision_recall(real: np.ndarray, made: np.ndarray) -> tuple[float, float]:
    """The share of made features inside the manifold of the real ones, and the other way round."""
    between = _distances(made, real)
    radius_real, radius_made = (np.partition(_distances(rows, rows), NEIGHBOURS, axis=1)[:, NEIGHBOURS] for rows in (real, made))
    return float((between <= radius_real).any(1).mean()), float((radius_made >= between.T).any(1).mean())


def share_interval(successes: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson score); the pictures are taken as independent."""
    if of == 0:
        return 0.0, 1.0
    share = successes / of
    middle, half = share + Z * Z / (2 * of), Z * np.sqrt(share * (1 - share) / of + Z * Z / (4 * of * of))
    return max(0.0, float((middle - half) / (1 + Z * Z / of))), min(1.0, float((middle + half) / (1 + Z * Z / of)))


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean (normal approximation)."""
    half = Z * np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.inf
    return float(np.mean(values) - half), float(np.mean(values) + half)


def ratio_interval(parts: np.ndarray, wholes: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of sum(parts) / sum(wholes), both (N,), over pairs drawn again with replacement (bootstrap)."""
    drawn = np.random.default_rng(0).integers(len(parts), size=(2000, len(parts)))
    low, high = np.percentile(parts[drawn].sum(1) / wholes[drawn].sum(1), [2.5, 97.5])
    return float(low), float(high)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    return np.sqrt(np.clip(squared, 0, None))
