"""The benchmark of the kernel: it rejects wrong results, and counts bytes and operations correctly."""

import pytest
import torch

from chorus.dev.benchmarks import device_timing
from chorus.dev.benchmarks import saliency_blend as bench
from chorus.kernels.saliency_blend import fused_torch, reference

CPU = torch.device("cpu")


@pytest.fixture
def case():
    return bench.Case((2, 4, 24, 20), 3, torch.float32, CPU, cache=1 << 20)


def test_bytes_include_predictions_outputs_and_mask(case):
    assert case.bytes == (2 * 3 + 2) * 4 * (2 * 4 * 24 * 20) + 2 * 24 * 20
    assert not case.beyond_cache
    assert sum(t.numel() for t in case.copies[0]) == case.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_correct_results_pass(dtype):
    case = bench.Case((2, 4, 24, 20), 3, dtype, CPU, cache=1 << 20)
    for name, function in bench.implementations(CPU).items():
        bench.check(case, name, function)


def wrong_mask_entry(out):
    out[2][0, 3, 4] = (out[2][0, 3, 4] + 1) % 3


def wrong_value(out):
    out[1][0, 1, 2, 3] *= 1.0001


def nan_value(out):
    out[0][0, 1, 2, 3] = float("nan")


@pytest.mark.parametrize("corrupt", [wrong_mask_entry, wrong_value, nan_value])
def test_wrong_result_is_not_timed(case, corrupt):
    def corrupted(*args, **kwargs):
        out = fused_torch.saliency_blend(*args, **kwargs)
        corrupt(out)
        return out

    with pytest.raises(ValueError, match="not timed"):
        bench.check(case, "corrupted", corrupted)


def test_constants_are_created_once():
    made = device_timing.Constants()
    with made:
        a, b, c = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    assert a is b
    assert c.tolist() == [3.0]


def test_launches_do_not_include_views():
    x = torch.zeros(3)
    assert device_timing.launches(lambda i: (x + i).view(3, 1) * 2, CPU) == 2


def test_measurement_has_rows_table_and_verdicts(case):
    rows = bench.measure(case, CPU, 3)
    assert [r["implementation"] for r in rows] == ["definition", "fused torch", "copy"]
    assert rows[0]["speedup"]["eager"] == 1.0
    assert rows[2]["share_of_copy"] == 1.0
    assert bench.markdown(rows, CPU).count("\n") == 4
    assert len(bench.verdicts(rows, CPU)) == 2


def test_baseline_is_the_reference_implementation():
    assert bench.implementations(CPU)[bench.DEFINITION] is reference.saliency_blend
