"""Every node of this ComfyUI that takes a MODEL and returns one, on the base, on the expert, on both, and on the blend.

The outcomes are compared with docs/compatibility.md.
"""

import pytest

from chorus.dev.tools import families
from chorus.host.host_version import TESTED, is_newer_than_tested
from chorus.tests.families.host_nodes import model_nodes
from chorus.tests.families.node_cells import PLACES, TriedNode
from chorus.tests.families.outcome import outcome_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def known():
    return families.documented()[1]


def check(names, places, known, folder):
    """Try the nodes ``names`` at the places that ``places(index)`` returns. ``names``: (index, name) pairs."""
    problems = []
    for index, name in names:
        tried, found = TriedNode(name, folder), {}
        for place in places(index):
            outcome = outcome_of(lambda: tried.check(place))  # noqa: B023
            found[name, place] = outcome.kind, outcome.text
        problems += families.differences(known, found, None)
    assert not problems, "\n".join([*problems, f"fix the wrong cells, then run `{families.COMMAND}`"])


@pytest.mark.slow
def test_every_node_is_documented(known):
    found = {(name, place) for name in model_nodes() for place in PLACES}
    new, gone = (sorted({name for name, _ in side}) for side in (found - known.keys(), known.keys() - found))
    if new and not gone and is_newer_than_tested():
        pytest.xfail(f"docs/compatibility.md describes ComfyUI {TESTED}; new nodes: {', '.join(new)}")
    assert not (new or gone), f"added nodes: {new}, removed nodes: {gone}; run `{families.COMMAND}`"


@pytest.mark.slow  # a minute for all
@pytest.mark.parametrize("number", range(8))
def test_nodes_at_a_sampled_place(number, known, tmp_path):
    # without the merging nodes for single families, which share their code with the other merging nodes
    names = [name for name, node in model_nodes().items() if not node.__module__.endswith("merging_model_specific")]
    if is_newer_than_tested():  # the test above names the new ones
        names = [name for name in names if (name, PLACES[0]) in known]
    # every second node; the quotient changes the place, because with the index two of four places would never be tried
    check(list(enumerate(names))[::2][number::8], lambda index: [PLACES[index // 2 % len(PLACES)]], known, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(8))
def test_every_node_at_every_place(number, known, tmp_path):
    check(list(enumerate(model_nodes()))[number::8], lambda index: PLACES, known, tmp_path)
