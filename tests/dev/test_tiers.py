"""Which cases of a parametrized test run in the quick tests."""

import math

import pytest

from chorus.tests.support.tiers import EXHAUSTIVE, covering, quick


def marked(cases) -> dict:
    return {case.values: [mark.name for mark in case.marks] for case in cases}


def test_cases_that_are_not_kept_are_marked():
    assert marked(quick([2], [1, 2, 3])) == {(1,): ["slow"], (2,): [], (3,): ["slow"]}
    assert marked(quick("b", {"a": 1, "b": 2}, EXHAUSTIVE)) == {("a",): ["exhaustive"], ("b",): []}
    with pytest.raises(AssertionError):
        quick([4], [1, 2, 3])


@pytest.mark.parametrize(
    "sizes", [(1,), (5,), (2, 2), (4, 4), (2, 3, 2), (2, 2, 2, 2), (24, 3), (3, 24), (5, 1, 4)], ids=str
)
def test_every_combination_is_a_case_and_the_quick_ones_contain_every_value(sizes):
    axes = {f"axis{k}": [f"{k} {n}" for n in range(size)] for k, size in enumerate(sizes)}
    names, cases = covering(**axes).args
    found = marked(cases)
    assert names == tuple(axes) and len({case.id for case in cases}) == len(cases) == len(found)
    kept = [values for values, marks in found.items() if not marks]
    assert all(marks in ([], ["exhaustive"]) for marks in found.values())
    assert {value for values in kept for value in values} == {value for axis in axes.values() for value in axis}
    count = math.prod(sizes)
    assert len(found) == count and len(kept) <= max(max(sizes), count // max(sizes))
