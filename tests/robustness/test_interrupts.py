"""Cancel at every step of every node that works for long: nothing stays behind, and the next run gives the same bits.

At all points of all nodes, with a run after each, before a release; at fewer of them for the time otherwise.
"""

import comfy.model_management
import pytest
import torch

from chorus.tests.robustness.long_nodes import CASES, folders, small  # noqa: F401 (fixtures)
from chorus.tests.robustness.remains import Remains, same_bits
from chorus.tests.robustness.stopping import Interrupted, Points

pytestmark = pytest.mark.usefixtures("one_thread", "folders", "small")
MOST, MOST_SLOW = 32, 12  # points of a node, and of one whose run is long


@pytest.fixture
def reference(request):
    """The case, what it gives, its points, and how things are after it."""
    with torch.inference_mode():
        case = CASES[request.param]()
        with Points() as points:
            expected = case.run()
        yield case, expected, points.seen, Remains(*case.wired)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def cancelled(case, k: int):
    """What a run gives that is cancelled at point ``k``, None where it ends; whether the cancel still waits for the next node."""
    with Points(at=k) as points:
        try:
            found = case.run()
        except Interrupted:
            found = None
        waiting = comfy.model_management.processing_interrupted()
    assert points.acted
    return found, waiting


def chosen(names: list[str], most: int | None) -> list[int]:
    """The points to stop at: all, but of more than ``most`` the first, the last and evenly some of those between; and where
    a question comes right before a network, which asks again, one of both."""
    points = [k for k, name in enumerate(names) if name != "question" or names[k + 1 : k + 2] in ([], ["question"])]
    if most is None or len(points) <= most:
        return points
    ends, inner = most // 4, points[most // 4 : -(most // 4)]
    return [*points[:ends], *inner[:: -(-len(inner) // (most // 2))], *points[-ends:]]


@pytest.mark.parametrize("reference", CASES, indirect=True)
def test_cancel_at_some_steps(reference, folders, record_property):  # noqa: F811
    check(reference, folders, record_property, every=False)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("reference", CASES, indirect=True)
def test_cancel_at_every_step(reference, folders, record_property):  # noqa: F811
    check(reference, folders, record_property, every=True)


def check(reference, folders, record_property, every: bool) -> None:  # noqa: F811
    case, expected, names, remains = reference
    points, outcomes = chosen(names, None if every else MOST_SLOW if case.slow else MOST), {}
    for n, k in enumerate(points):
        where, before = f"cancelled at point {k} of {len(names)}, {names[k]}", files(folders)
        found, waiting = cancelled(case, k)
        remains.check(where, case.draws)
        written = [file for file in files(folders) if file not in before]
        assert not any(file.endswith(".part") for file in written), where
        outcomes[k] = outcome(case, found, waiting, expected, [f for f in written if "interrupted" in f], where)
        if every or not case.slow or n % 4 == 3 or k == points[-1]:
            assert same_bits(case.run(), expected), f"{where}: the next run is another"
    remains.check("after all", case.draws)
    # from some point on there is something to keep, and from then on it is kept
    kept = [k for k, what in outcomes.items() if what != "ended"]
    if case.cancel_keeps or case.learns:
        assert 0 < len(kept) < len(points) and kept == points[-len(kept) :], outcomes
    record_property("points", len(names))
    record_property("points cancelled", len(points))
    record_property("kept what there was", len(kept))


def outcome(case, found, waiting: bool, expected, written: list[str], where: str) -> str:
    if found is None:
        assert not waiting and len(written) <= case.learns, where
        return "written" if written else "ended"
    if waiting:  # nobody has asked any more; the host does before the next node
        assert same_bits(found, expected), where
        return "finished"
    assert case.cancel_keeps and found[-1].startswith("interrupted: this is the best so far"), where
    return "best so far"
