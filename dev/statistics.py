"""Confidence intervals of the benchmarks, computed with scipy."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 4000  # number of resamples of a bootstrap


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson's score interval)."""
    low, high = stats.binomtest(hits, trials).proportion_ci(0.95, method="wilson")
    return float(low), float(high)


def proportion(hits: np.ndarray) -> dict[str, Any]:
    """The share of true values of bool ``hits`` [N], its 95 % interval and N."""
    return {"share": float(hits.mean()), "interval": wilson(int(hits.sum()), len(hits)), "images": len(hits)}


def bootstrap(samples: Sequence[np.ndarray], statistic: Callable) -> tuple[float, float]:
    """95 % percentile bootstrap interval of ``statistic(*samples, axis=-1)``, with a fixed seed.

    All arrays of ``samples`` have shape [N] and are resampled with the same indices. For N = 1 both bounds are the
    statistic itself.
    """
    if len(samples[0]) == 1:
        return (float(statistic(*samples, axis=-1)),) * 2
    rng = np.random.default_rng(0)
    found = stats.bootstrap(samples, statistic, n_resamples=RESAMPLES, paired=True, method="percentile", rng=rng)
    return tuple(map(float, found.confidence_interval))


def group_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Mean of the values of each group, an array [number of groups]."""
    return np.array([values[groups == g].mean() for g in np.unique(groups)])


def paired_difference(a: np.ndarray, b: np.ndarray, groups: np.ndarray) -> tuple[float, float, float]:
    """Mean of a - b and its 95 % bootstrap interval; whole ``groups`` (images of one prompt) are resampled
    together."""
    difference = a.astype(float) - b.astype(float)
    return float(difference.mean()), *bootstrap([group_means(difference, groups)], np.mean)


def ratio_of_means(a: np.ndarray, b: np.ndarray, groups: np.ndarray) -> tuple[float, float, float]:
    """mean(a) / mean(b) of paired values and its 95 % bootstrap interval; whole ``groups`` are resampled together."""

    def ratio(top, bottom, axis):
        return top.mean(axis) / bottom.mean(axis)

    return float(a.mean() / b.mean()), *bootstrap([group_means(v, groups) for v in (a, b)], ratio)


def mean_of_groups(values: np.ndarray, groups: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval; whole ``groups`` (images of one prompt) are resampled
    together."""
    return paired_difference(values, np.zeros(len(values)), groups)
