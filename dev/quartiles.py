"""Quartiles, without numpy and scipy, because ``bench gpu --bundle`` runs where neither is installed."""

import statistics
from collections.abc import Sequence


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median, third quartile; interpolated as numpy.quantile does."""
    values = [float(value) for value in values]
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
