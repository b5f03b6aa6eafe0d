"""The intervals of the tables, against scipy's and against data whose answer is known."""

import numpy as np
import pytest
from scipy.stats import binomtest

from chorus.dev.statistics import paired_difference, wilson


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (3, 10), (10, 10), (178, 300)])
def test_wilson_is_scipys(hits, trials):
    expected = binomtest(hits, trials).proportion_ci(0.95, method="wilson")
    assert wilson(hits, trials) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_paired_difference_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        prompt = rng.normal(0.3, 0.5, 60).repeat(3)  # pictures of one prompt go together
        groups = np.arange(60).repeat(3)
        _, low, high = paired_difference(prompt + rng.normal(0, 0.2, 180), np.zeros(180), groups, draws=500)
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_paired_difference_of_equals_is_zero():
    hits = np.array([1, 0, 1, 1])
    assert paired_difference(hits, hits, np.array([0, 0, 1, 1])) == (0.0, 0.0, 0.0)
