"""Out of memory in the forward or backward pass of any network.

The error is reported, nothing leaks, and the next run returns the same bits.
"""

from functools import partial

import comfy.model_management
import pytest
import torch

from chorus.techniques.cas_dm import comfy_train_node
from chorus.tests.robustness.interrupt_points import BackwardPoints, InterruptPoints, run_out_of_memory
from chorus.tests.robustness.leak_check import LeakCheck, same_bits
from chorus.tests.robustness.slow_nodes import CASES, folders, small  # noqa: F401 (fixtures)

pytestmark = pytest.mark.usefixtures("one_thread", "folders", "small")
# networks of the demo's VAE; ComfyUI's VAE decodes and encodes in tiles when memory is insufficient
VAE = {"Encoder", "Decoder"}
NETWORKS = {name: make for name, make in CASES.items() if name != "SaveTrainingPairs"}


@pytest.fixture
def reference(request):
    with torch.inference_mode():
        case = NETWORKS[request.param]()
        with InterruptPoints(count_checks=False) as forward:
            expected = case.run()
        with BackwardPoints() as backward:
            assert same_bits(case.run(), expected)
        yield case, expected, forward.names, backward.names, LeakCheck(*case.wired)


def first_and_later(names: list[str]) -> list[int]:
    """The points of the first and of the middle run of every network."""
    runs = {name: [k for k, n in enumerate(names) if n == name] for name in names}
    return sorted({k for points in runs.values() for k in (points[0], points[len(points) // 2])})


@pytest.mark.parametrize("reference", NETWORKS, indirect=True)
def test_out_of_memory_reported_without_leaks(reference, record_property):
    case, expected, forward, backward, leak_check = reference
    has_backward = case.is_training or any("UNetModel" in name for name in backward)
    assert bool(backward) == has_backward
    tried = [(partial(InterruptPoints, count_checks=False), k, forward[k]) for k in first_and_later(forward)]
    tried += [(BackwardPoints, k, backward[k]) for k in first_and_later(backward)]
    for n, (kind, k, name) in enumerate(tried):
        where = f"out of memory at point {k}, {name}"
        with kind(at=k, act=run_out_of_memory) as points:
            try:
                result, error = case.run(), None
            except Exception as raised:
                result, error = None, raised
        assert points.acted, where
        if error is None:  # ComfyUI used tiles, or only the preview of the result is missing
            reported = case.is_training and "NOT shown: the preview of the result" in result[-1]
            assert (name in VAE and case.cancel_returns_best) or reported, where
        else:
            assert comfy.model_management.is_oom(error), f"{where}: {error!r}"
            assert f"({name})" in str(error), where
        leak_check.check(where, case.uses_global_rng)
        if not case.slow or n in (len(tried) // 2, len(tried) - 1):
            assert same_bits(case.run(), expected), f"{where}: the next run differs"
    record_property("points out of memory", len(tried))


def test_out_of_memory_in_the_preview_keeps_the_trained_head(monkeypatch):
    """The head is the same as with enough memory, and the report names what is missing."""
    with torch.inference_mode():
        case = CASES["TrainCasDMHead"]()
        head, losses, report = case.run()

        def sheet(trainer, pictures):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        monkeypatch.setattr(comfy_train_node, "sheet", sheet)
        result = case.run()
    assert same_bits(result[:2], [head, losses])
    assert (
        result[2] == f"{report}\nNOT shown: the preview of the result: CUDA out of memory. Tried to allocate 2.00 GiB"
    )


def test_seed_search_uses_smaller_batches_if_memory_is_short(monkeypatch):
    """The result has the same bits, because the best seed is finally sampled in a batch of one."""
    with torch.inference_mode():
        case = CASES["SeedSelect search"]()
        with InterruptPoints(count_checks=False) as roomy:
            expected = case.run()
        model, needed = case.wired[0], case.wired[0].memory_required
        monkeypatch.setattr(model, "memory_required", lambda shape: needed(shape) if shape[0] <= 2 else 2**60)
        with InterruptPoints(count_checks=False) as short:
            result = case.run()
    assert short.names.count("UNetModel") == roomy.names.count("UNetModel") + 1
    assert same_bits(result[:3], expected[:3])
