"""Intervals for the tables."""

import math

import numpy as np


def quartiles(values) -> list[float]:
    """First quartile, median, third quartile."""
    return [float(q) for q in np.quantile(values, [0.25, 0.5, 0.75])]


def wilson(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson's score interval)."""
    p = hits / trials
    middle = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return tuple((middle + sign * spread) / (1 + z * z / trials) for sign in (-1, 1))


def paired_difference(
    a: np.ndarray, b: np.ndarray, groups: np.ndarray, draws: int = 4000
) -> tuple[float, float, float]:
    """Mean of a - b and its 95 % bootstrap interval; whole ``groups`` (the pictures of one prompt) are drawn together."""
    difference = a.astype(float) - b.astype(float)
    means = np.array([difference[groups == g].mean() for g in np.unique(groups)])
    rng = np.random.default_rng(0)
    samples = means[rng.integers(0, len(means), (draws, len(means)))].mean(1)
    return float(difference.mean()), *(float(v) for v in np.quantile(samples, [0.025, 0.975]))


def ratio_of_means(a: np.ndarray, b: np.ndarray, groups: np.ndarray, draws: int = 4000) -> tuple[float, float, float]:
    """mean(a) / mean(b) of paired values and its 95 % bootstrap interval; whole ``groups`` are drawn together."""
    means = np.array([[v[groups == g].mean() for v in (a, b)] for g in np.unique(groups)])
    rng = np.random.default_rng(0)
    top, bottom = means[rng.integers(0, len(means), (draws, len(means)))].mean(1).T
    return float(a.mean() / b.mean()), *(float(v) for v in np.quantile(top / bottom, [0.025, 0.975]))


def mean_of_groups(values: np.ndarray, groups: np.ndarray, draws: int = 4000) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval; whole ``groups`` (the pictures of one prompt) are drawn together."""
    return paired_difference(values, np.zeros(len(values)), groups, draws)
