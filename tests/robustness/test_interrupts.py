"""Cancel at every step of every slow node: nothing leaks, and the next run returns the same bits.

Before a release, all points of all nodes are tested, with a complete run after each. Otherwise a sample is tested.
"""

import comfy.model_management
import pytest
import torch

from chorus.tests.robustness.interrupt_points import Interrupted, InterruptPoints
from chorus.tests.robustness.leak_check import LeakCheck, same_bits
from chorus.tests.robustness.slow_nodes import CASES, folders, small  # noqa: F401 (fixtures)

pytestmark = pytest.mark.usefixtures("one_thread", "folders", "small")
MAX_POINTS, MAX_POINTS_SLOW = 20, 8  # sampled points per node, and per node with slow runs


@pytest.fixture
def reference(request):
    """A case, its outputs, the names of its interrupt points, and a leak check made after the run."""
    with torch.inference_mode():
        case = CASES[request.param]()
        with InterruptPoints() as points:
            expected = case.run()
        yield case, expected, points.names, LeakCheck(*case.wired)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def run_cancelled_at(case, k: int):
    """(the outputs of a run cancelled at point ``k``, or None if the run stopped; whether the interrupt is still pending)"""
    with InterruptPoints(at=k) as points:
        try:
            result = case.run()
        except Interrupted:
            result = None
        pending = comfy.model_management.processing_interrupted()
    assert points.acted
    return result, pending


def sample_points(names: list[str], limit: int | None) -> list[int]:
    """Points at which to cancel: all, or about ``limit`` of them: the first, the last, and evenly spaced ones in between.

    An interrupt check right before a network is left out, because the network checks again.
    """
    points = [
        k
        for k, name in enumerate(names)
        if name != "interrupt check" or names[k + 1 : k + 2] in ([], ["interrupt check"])
    ]
    if limit is None or len(points) <= limit:
        return points
    ends, inner = limit // 4, points[limit // 4 : -(limit // 4)]
    return [*points[:ends], *inner[:: -(-len(inner) // (limit // 2))], *points[-ends:]]


@pytest.mark.parametrize("reference", CASES, indirect=True)
def test_cancel_at_some_steps(reference, folders, record_property):  # noqa: F811
    check(reference, folders, record_property, every=False)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("reference", CASES, indirect=True)
def test_cancel_at_every_step(reference, folders, record_property):  # noqa: F811
    check(reference, folders, record_property, every=True)


def check(reference, folders, record_property, every: bool) -> None:  # noqa: F811
    case, expected, names, leak_check = reference
    points, outcomes = sample_points(names, None if every else MAX_POINTS_SLOW if case.slow else MAX_POINTS), {}
    for n, k in enumerate(points):
        where, before = f"cancelled at point {k} of {len(names)}, {names[k]}", files(folders)
        result, pending = run_cancelled_at(case, k)
        leak_check.check(where, case.uses_global_rng)
        written = [file for file in files(folders) if file not in before]
        assert not any(file.endswith(".part") for file in written), where
        outcomes[k] = outcome(case, result, pending, expected, [f for f in written if "interrupted" in f], where)
        if every or not case.slow or n % 4 == 3 or k == points[-1]:
            assert same_bits(case.run(), expected), f"{where}: the next run differs"
    leak_check.check("after all points", case.uses_global_rng)
    # if a result is kept at some point, it is kept at every later point
    kept = [k for k, what in outcomes.items() if what != "ended"]
    if case.cancel_returns_best or case.is_training:
        assert 0 < len(kept) < len(points) and kept == points[-len(kept) :], outcomes
    record_property("points", len(names))
    record_property("points cancelled", len(points))
    record_property("points with a kept result", len(kept))


def outcome(case, result, pending: bool, expected, written: list[str], where: str) -> str:
    if result is None:
        assert not pending and len(written) <= case.is_training, where
        return "written" if written else "ended"
    if pending:  # nothing checked after the interrupt; ComfyUI checks before the next node
        assert same_bits(result, expected), where
        return "finished"
    assert case.cancel_returns_best and result[-1].startswith("interrupted: "), where
    return "best so far"
