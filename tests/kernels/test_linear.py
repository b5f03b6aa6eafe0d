"""The linear kernel compared with torch's linear, and the cases in which torch computes the product."""

import pytest
import torch
import torch.nn.functional as F

from chorus.kernels import linear as module
from chorus.kernels.linear import linear


@pytest.fixture
def onednn(monkeypatch):
    """A list to which every call of oneDNN's operator is appended."""
    if not module._has_onednn():
        pytest.skip("this torch has no oneDNN")
    calls, operator = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *a: calls.append(a) or operator(*a))
    return calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 7, 5), (2, 3, 4, 5)], ids=str)
def test_product_matches_float64(shape, bias, onednn):
    x, weight, b = torch.randn(shape), torch.randn(9, 5), torch.randn(9) if bias else None
    expected = F.linear(x.double(), weight.double(), b.double() if bias else None)
    out = linear(x, weight, b)
    assert out.dtype == torch.float32 and out.shape == (*shape[:-1], 9)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert len(onednn) == 1


def test_strided_inputs_accepted(onednn):
    x, weight = torch.randn(5, 6, 4).transpose(0, 2), torch.randn(5, 9).t()
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)
    assert len(onednn) == 1


def test_inference_tensors_accepted(onednn):
    with torch.inference_mode():
        x, weight = torch.randn(3, 5), torch.randn(9, 5)
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)
    assert len(onednn) == 1


@pytest.mark.parametrize("name", ["x", "weight"])
def test_gradients_computed_by_torch(name, onednn):
    x, weight = torch.randn(3, 5), torch.randn(9, 5)
    leaf = {"x": x, "weight": weight}[name].requires_grad_()
    linear(x, weight).square().sum().backward()
    gradient, leaf.grad = leaf.grad, None
    F.linear(x, weight).square().sum().backward()
    assert torch.equal(gradient, leaf.grad)
    assert not onednn


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_computed_by_torch(dtype, onednn):
    x, weight = torch.randn(3, 5, dtype=dtype), torch.randn(9, 5, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert not onednn


def test_output_of_an_empty_input_is_empty(onednn):
    assert linear(torch.randn(0, 5), torch.randn(9, 5)).shape == (0, 9)
    assert not onednn


def test_mismatched_width_rejected():
    with pytest.raises(RuntimeError):
        linear(torch.randn(3, 4), torch.randn(9, 5))


def test_computed_by_torch_without_onednn(monkeypatch):
    monkeypatch.setattr(module, "_has_onednn", lambda: False)
    x, weight = torch.randn(3, 5), torch.randn(9, 5)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize(
    "operator",
    [None, lambda *a: torch.zeros(2, 4), lambda x, weight: x @ weight.t()],
    ids=["missing", "other result", "other arguments"],
)
def test_missing_or_changed_onednn_operator_not_used(monkeypatch, operator):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    module._has_onednn.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", operator)
    try:
        x, weight = torch.randn(3, 5), torch.randn(9, 5)
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    finally:
        module._has_onednn.cache_clear()
