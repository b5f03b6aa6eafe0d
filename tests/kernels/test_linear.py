"""The pack's linear against torch's, and where it leaves the work to torch."""

import pytest
import torch
import torch.nn.functional as F

from chorus.kernels import linear as room
from chorus.kernels.linear import linear


@pytest.fixture
def onednn(monkeypatch):
    """Counts the calls of oneDNN's operator."""
    if not room._has_onednn():
        pytest.skip("this torch has no oneDNN")
    calls, operator = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *a: calls.append(a) or operator(*a))
    return calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 7, 5), (2, 3, 4, 5)], ids=str)
def test_product_is_torchs(shape, bias, onednn):
    x, weight, b = torch.randn(shape), torch.randn(9, 5), torch.randn(9) if bias else None
    expected = F.linear(x.double(), weight.double(), b.double() if bias else None)
    out = linear(x, weight, b)
    assert out.dtype == torch.float32 and out.shape == (*shape[:-1], 9)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert len(onednn) == 1


def test_strides_do_not_matter(onednn):
    x, weight = torch.randn(5, 6, 4).transpose(0, 2), torch.randn(5, 9).t()
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)
    assert len(onednn) == 1


def test_inference_tensors_are_taken(onednn):
    with torch.inference_mode():
        x, weight = torch.randn(3, 5), torch.randn(9, 5)
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)
    assert len(onednn) == 1


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_gradients_are_torchs(wanted, onednn):
    x, weight = torch.randn(3, 5), torch.randn(9, 5)
    leaf = {"x": x, "weight": weight}[wanted].requires_grad_()
    linear(x, weight).square().sum().backward()
    gradient, leaf.grad = leaf.grad, None
    F.linear(x, weight).square().sum().backward()
    assert torch.equal(gradient, leaf.grad)
    assert not onednn


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs(dtype, onednn):
    x, weight = torch.randn(3, 5, dtype=dtype), torch.randn(9, 5, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert not onednn


def test_nothing_in_is_nothing_out(onednn):
    assert linear(torch.randn(0, 5), torch.randn(9, 5)).shape == (0, 9)
    assert not onednn


def test_a_wrong_width_is_refused():
    with pytest.raises(RuntimeError):
        linear(torch.randn(3, 4), torch.randn(9, 5))


def test_without_onednn_it_is_torchs(monkeypatch):
    monkeypatch.setattr(room, "_has_onednn", lambda: False)
    x, weight = torch.randn(3, 5), torch.randn(9, 5)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize(
    "operator",
    [None, lambda *a: torch.zeros(2, 4), lambda x, weight: x @ weight.t()],
    ids=["absent", "other numbers", "other arguments"],
)
def test_an_operator_that_changed_is_left_alone(monkeypatch, operator):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    room._has_onednn.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", operator)
    try:
        x, weight = torch.randn(3, 5), torch.randn(9, 5)
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    finally:
        room._has_onednn.cache_clear()
