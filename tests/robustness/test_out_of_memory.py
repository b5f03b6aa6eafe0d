"""Out of memory in any network, on its way forward or back: the user is told of that and of nothing else, nothing stays
behind, and the next run gives the same bits."""

from functools import partial

import comfy.model_management
import pytest
import torch

from chorus.techniques.cas_dm import comfy_train_node
from chorus.tests.robustness.long_nodes import CASES, folders, small  # noqa: F401 (fixtures)
from chorus.tests.robustness.remains import Remains, same_bits
from chorus.tests.robustness.stopping import BackwardPoints, Points, run_out_of_memory

pytestmark = pytest.mark.usefixtures("one_thread", "folders", "small")
VAE = {
    "Cleaner",
    "Sequential",
}  # of the demo; where ComfyUI's own VAE node lacks memory, it decodes and encodes in tiles
NETWORKS = {name: make for name, make in CASES.items() if name != "SaveTrainingPairs"}


@pytest.fixture
def reference(request):
    with torch.inference_mode():
        case = NETWORKS[request.param]()
        with Points(asked=False) as forward:
            expected = case.run()
        with BackwardPoints() as backward:
            assert same_bits(case.run(), expected)
        yield case, expected, forward.seen, backward.seen, Remains(*case.wired)


def first_and_later(names: list[str]) -> list[int]:
    """Of every network: where it runs first, and in the middle of its runs."""
    places = {name: [k for k, n in enumerate(names) if n == name] for name in names}
    return sorted({k for own in places.values() for k in (own[0], own[len(own) // 2])})


@pytest.mark.parametrize("reference", NETWORKS, indirect=True)
def test_want_of_memory_is_told_and_leaves_nothing(reference, record_property):
    case, expected, forward, backward, remains = reference
    learns_backwards = case.learns or any("UNetModel" in name for name in backward)
    assert bool(backward) == learns_backwards
    tried = [(partial(Points, asked=False), k, forward[k]) for k in first_and_later(forward)]
    tried += [(BackwardPoints, k, backward[k]) for k in first_and_later(backward)]
    for n, (kind, k, name) in enumerate(tried):
        where = f"out of memory at point {k}, {name}"
        with kind(at=k, act=run_out_of_memory) as points:
            try:
                found, error = case.run(), None
            except Exception as raised:
                found, error = None, raised
        assert points.acted, where
        if error is None:  # ComfyUI has decoded in tiles; or a picture of what was learned is missing
            told = case.learns and "NOT shown: the pictures of the result" in found[-1]
            assert (name in VAE and case.cancel_keeps) or told, where
        else:
            assert comfy.model_management.is_oom(error), f"{where}: {error!r}"
            assert f"({name})" in str(error), where
        remains.check(where, case.draws)
        if not case.slow or n in (len(tried) // 2, len(tried) - 1):
            assert same_bits(case.run(), expected), f"{where}: the next run is another"
    record_property("points out of memory", len(tried))


def test_of_the_pictures_of_a_result_none_is_worth_the_training(monkeypatch):
    """The head is handed out as without want of memory, and the report says what is missing."""
    with torch.inference_mode():
        case = CASES["TrainCasDMHead"]()
        head, losses, report = case.run()

        def sheet(trainer, pictures):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        monkeypatch.setattr(comfy_train_node, "sheet", sheet)
        found = case.run()
    assert same_bits(found[:2], [head, losses])
    assert (
        found[2] == f"{report}\nNOT shown: the pictures of the result: CUDA out of memory. Tried to allocate 2.00 GiB"
    )


def test_seeds_are_searched_a_few_at_a_time_where_memory_is_short(monkeypatch):
    """And the picture is the same to the bit, since it is sampled by itself."""
    with torch.inference_mode():
        case = CASES["SeedSelect search"]()
        with Points(asked=False) as roomy:
            whole = case.run()
        model, needed = case.wired[0], case.wired[0].memory_required
        monkeypatch.setattr(model, "memory_required", lambda shape: needed(shape) if shape[0] <= 2 else 2**60)
        with Points(asked=False) as short:
            alone = case.run()
    assert short.seen.count("UNetModel") == roomy.seen.count("UNetModel") + 1
    assert same_bits(alone[:3], whole[:3])
