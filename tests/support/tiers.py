"""Selects the cases of a parametrized test that run in the quick tests. All others are marked slow or exhaustive."""

import itertools
import math

import pytest

SLOW, EXHAUSTIVE = pytest.mark.slow, pytest.mark.exhaustive


def quick(kept, cases, others=SLOW):
    """The parameters ``cases``, all marked ``others`` except those in ``kept``."""
    missing = [case for case in kept if case not in cases]
    assert not missing, missing
    return [pytest.param(case, marks=() if case in kept else others) for case in cases]


def name(value) -> str:
    return getattr(value, "__name__", None) or str(value)


def covering(**axes):
    """Parametrize with every combination of ``axes``. As many as contain each value run in the quick tests.

    The others are marked exhaustive: they only combine values that already run with others.
    The values of an axis are a list, or a dict of them by id.
    """
    named = [
        list(axis.items()) if isinstance(axis, dict) else [(name(value), value) for value in axis]
        for axis in axes.values()
    ]
    # Case i contains value i of the longest axis. The others are shifted, because the first values of all axes are often
    # the same setting, and change with different periods, so that the same two values do not always meet
    order = sorted(range(len(named)), key=lambda k: -len(named[k]))
    strides = dict.fromkeys(order, 1) | {
        k: math.prod(len(named[j]) for j in order[1:i]) for i, k in enumerate(order) if i
    }
    cases = max(strides[k] * len(named[k]) for k in order)
    chosen = {tuple((case // strides[k] + k) % len(named[k]) for k in range(len(named))) for case in range(cases)}
    rows = [
        pytest.param(
            *(named[k][index][1] for k, index in enumerate(row)),
            id="-".join(named[k][index][0] for k, index in enumerate(row)),
            marks=() if row in chosen else EXHAUSTIVE,
        )
        for row in itertools.product(*(range(len(values)) for values in named))
    ]
    return pytest.mark.parametrize(tuple(axes), rows)
