"""The benchmark of the kernel refuses wrong results, and counts as it says."""

import pytest
import torch

from chorus.dev.benchmarks import saliency_blend as bench
from chorus.kernels.saliency_blend import fused_torch, reference

CPU = torch.device("cpu")


@pytest.fixture
def case():
    return bench.Case((2, 4, 24, 20), 3, torch.float32, CPU, cache=1 << 20)


def test_bytes_are_predictions_outputs_and_mask(case):
    assert case.bytes == (2 * 3 + 2) * 4 * (2 * 4 * 24 * 20) + 2 * 24 * 20
    assert not case.beyond_cache
    assert sum(t.numel() for t in case.copies[0]) == case.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_right_results_pass(dtype):
    case = bench.Case((2, 4, 24, 20), 3, dtype, CPU, cache=1 << 20)
    for name, function in bench.contenders(CPU).items():
        bench.check(case, name, function)


def wrong_owner(out):
    out[2][0, 3, 4] = (out[2][0, 3, 4] + 1) % 3


def wrong_bit(out):
    out[1][0, 1, 2, 3] *= 1.0001


def not_a_number(out):
    out[0][0, 1, 2, 3] = float("nan")


@pytest.mark.parametrize("spoil", [wrong_owner, wrong_bit, not_a_number])
def test_a_wrong_result_is_not_timed(case, spoil):
    def spoiled(*args, **kwargs):
        out = fused_torch.saliency_blend(*args, **kwargs)
        spoil(out)
        return out

    with pytest.raises(ValueError, match="not timed"):
        bench.check(case, "spoiled", spoiled)


def test_constants_are_made_once():
    made = bench.Constants()
    with made:
        a, b, c = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    assert a is b
    assert c.tolist() == [3.0]


def test_ops_are_counted_without_views():
    x = torch.zeros(3)
    assert bench.launches(lambda i: (x + i).view(3, 1) * 2, CPU) == 2


def test_rows_make_a_table_and_a_verdict(case):
    rows = bench.measure(case, CPU, 3)
    assert [r["implementation"] for r in rows] == ["definition", "fused torch", "copy"]
    assert rows[0]["speedup"]["eager"] == 1.0
    assert rows[2]["share_of_copy"] == 1.0
    assert bench.markdown(rows, CPU).count("\n") == 4
    assert len(bench.verdicts(rows, CPU)) == 2


def test_the_definition_is_what_the_others_are_compared_with():
    assert bench.contenders(CPU)[bench.DEFINITION] is reference.saliency_blend
