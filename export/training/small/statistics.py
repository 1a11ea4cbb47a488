"""How far a set of pictures is from another in the features of a network: Frechet distance, KID, precision and recall."""

import numpy as np

NEIGHBOURS = 3
"""Kynkaanniemi et al. 2019 as OpenAI's evaluator runs it: a set's manifold is the balls to the third neighbour."""


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance of two sets of features (N, D) and (M, D), taken as Gaussians (Heusel et al. 2017). Both larger than D."""
    mean = a.mean(0) - b.mean(0)
    first, second = (np.cov(each, rowvar=False) for each in (a, b))
    # The trace of the root of a product is that of a symmetric matrix with the same eigenvalues.
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ second @ root)
    return float(mean @ mean + np.trace(first) + np.trace(second) - 2 * np.sqrt(np.clip(cross, 0, None)).sum())


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The squared maximum mean discrepancy of a cubic kernel, unbiased (KID, Binkowski et al. 2018), over all rows at once."""
    n, m = len(a), len(b)
    own = [(each @ each.T / each.shape[1] + 1) ** 3 for each in (a, b)]
    inside = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in own)
    return float(inside - 2 * ((a @ b.T / a.shape[1] + 1) ** 3).sum() / (n * m))


def precision_recall(real: np.ndarray, made: np.ndarray) -> tuple[float, float]:
    """The share of made features inside the manifold of the real ones, and the other way round."""
    between = _distances(made, real)
    radius_real, radius_made = (np.partition(_distances(each, each), NEIGHBOURS, axis=1)[:, NEIGHBOURS] for each in (real, made))
    return float((between <= radius_real).any(1).mean()), float((radius_made >= between.T).any(1).mean())


def interval(successes: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson score)."""
    if of == 0:
        return 0.0, 1.0
    z, share = 1.96, successes / of
    middle, half = share + z * z / (2 * of), z * np.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return float((middle - half) / (1 + z * z / of)), float((middle + half) / (1 + z * z / of))


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    return np.sqrt(np.clip(squared, 0, None))
