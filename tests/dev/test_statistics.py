"""Confidence intervals, compared with their definitions and on data with known parameters."""

import math

import numpy as np
import pytest

from chorus.dev.statistics import bootstrap, paired_difference, ratio_of_means, wilson

Z = 1.959964  # 97.5 % of a normal distribution


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (3, 10), (10, 10), (178, 300)])
def test_wilson_bounds_are_z_standard_errors_from_the_proportion(hits, trials):
    share, (low, high) = hits / trials, wilson(hits, trials)
    assert low <= share <= high and low < high
    for bound in (low, high):
        distance = Z * math.sqrt(bound * (1 - bound) / trials)
        assert abs(bound - share) == pytest.approx(distance, abs=1e-6)


def grouped(rng: np.random.Generator, mean: float) -> np.ndarray:
    """Three values for each of 60 prompts; values of one prompt are correlated."""
    return rng.normal(mean, 0.5, 60).repeat(3) + rng.normal(0, 0.2, 180)


GROUPS = np.arange(60).repeat(3)


def test_paired_difference_has_its_nominal_coverage():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        _, low, high = paired_difference(grouped(rng, 0.3), np.zeros(180), GROUPS)
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_interval_width_matches_the_standard_error():
    values = grouped(np.random.default_rng(2), 0.3)
    means = values.reshape(60, 3).mean(1)
    mean, low, high = paired_difference(values, np.zeros(180), GROUPS)
    assert mean == pytest.approx(means.mean())
    assert high - low == pytest.approx(2 * Z * means.std() / math.sqrt(60), rel=0.06)


def test_ratio_resamples_pairs():
    """Numerator and denominator of a group are resampled together, so a constant ratio has a zero-width interval."""
    values = 3 + grouped(np.random.default_rng(3), 0.0)
    assert ratio_of_means(values / 4, values, GROUPS) == pytest.approx((0.25, 0.25, 0.25))
    ratio, low, high = ratio_of_means(grouped(np.random.default_rng(4), 1.0), values, GROUPS)
    assert low < ratio < high


def test_interval_is_deterministic():
    values = np.random.default_rng(5).normal(size=20)
    assert bootstrap([values], np.median) == bootstrap([values], np.median)
    assert bootstrap([values[:1]], np.median) == (values[0], values[0])


def test_paired_difference_of_equal_values_is_zero():
    hits = np.array([1, 0, 1, 1])
    assert paired_difference(hits, hits, np.array([0, 0, 1, 1])) == (0.0, 0.0, 0.0)
