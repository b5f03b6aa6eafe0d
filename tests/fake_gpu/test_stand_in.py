"""The stand-in for GPUs raises where torch's own fake tensors on CUDA devices raise, and nowhere else."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from chorus.tests.support.fake_gpu import FakeGPUs, HostWait, MixedDevices, device_of

SNIPPETS = {
    # name: (function of tensors on cuda:0, cuda:1 and the CPU; the error that it must raise, or None)
    "sum": (lambda a, b, c: a + a.mean(), None),
    "number": (lambda a, b, c: torch.where(a > 0.0, a, 0.0).clamp(min=0.1), None),
    "number on the host": (lambda a, b, c: a * c.new_zeros(()), None),
    "move": (lambda a, b, c: a + b.to("cuda:0") + c.to(a), None),
    "new tensors": (lambda a, b, c: a.new_zeros(3) + torch.ones(3, device=a.device) + torch.zeros_like(a[0]), None),
    "convolution": (lambda a, b, c: torch.nn.functional.conv2d(a[None, None], a[None, None]), None),
    "index": (lambda a, b, c: a[a.argmax(1)], None),
    "index on the host": (lambda a, b, c: a[torch.arange(2)], None),
    "write a number at a mask": (lambda a, b, c: a.clone().masked_fill_(a > 0.0, 1.0), None),
    "host": (lambda a, b, c: a + c, MixedDevices),
    "another device": (lambda a, b, c: torch.cat([a, b]), MixedDevices),
    "weights on the host": (lambda a, b, c: torch.nn.functional.linear(a, c), MixedDevices),
    "result on the host": (lambda a, b, c: torch.where(a > 0.0, a, c), MixedDevices),
    "matrix product": (lambda a, b, c: a @ b, MixedDevices),
    "item": (lambda a, b, c: a.sum().item(), HostWait),
    "bool": (lambda a, b, c: bool((a > 0.0).any()), HostWait),
    "float": (lambda a, b, c: float(a[0, 0]), HostWait),
    "range": (lambda a, b, c: list(range(a.argmax())), HostWait),
    "list": (lambda a, b, c: a.tolist(), HostWait),
    "boolean index": (lambda a, b, c: a[a > 0.0], HostWait),
    "nonzero": (lambda a, b, c: a.nonzero(), HostWait),
    "equal": (lambda a, b, c: torch.equal(a, a), HostWait),
}
NOT_SEEN_BY_FAKE_TENSORS = {"list"}  # tolist() of a fake tensor returns symbols


@pytest.mark.parametrize("name", SNIPPETS)
def test_stand_in_raises_where_fake_tensors_raise(name):
    function, error = SNIPPETS[name]
    values = torch.randn(3, 3)
    with FakeGPUs():
        tensors = values.to("cuda"), values.to("cuda:1"), values
        assert [str(t.device) for t in tensors] == ["cuda:0", "cuda:1", "cpu"]
        if error is None:
            assert device_of(function(*tensors)) == torch.device("cuda:0")
        else:
            with pytest.raises(error):
                function(*tensors)
    if name in NOT_SEEN_BY_FAKE_TENSORS:
        return
    with FakeTensorMode():
        tensors = torch.empty(3, 3, device="cuda"), torch.empty(3, 3, device="cuda:1"), torch.empty(3, 3)
        if error is None:
            assert str(function(*tensors).device) == "cuda:0"
        else:
            with pytest.raises(Exception, match=r"device|[Dd]ata|_local_scalar_dense|dynamic|aten\."):
                function(*tensors)


def test_blocking_copies_wait_in_both_directions():
    with FakeGPUs() as gpus:
        a = torch.ones(3, device="cuda")
        with pytest.raises(HostWait):
            a.cpu()
        with pytest.raises(HostWait):
            a.to("cpu", torch.float16)
        with pytest.raises(HostWait):
            torch.zeros(3).copy_(a)
        assert device_of(a.to("cpu", non_blocking=True)) is None
        assert str(torch.zeros(3).to(a).device) == "cuda:0"  # this copy may wait, because it is outside of the steps
        with gpus.steps():
            for copy in (
                lambda: torch.zeros(3).to("cuda"),
                lambda: torch.tensor([1.0], device="cuda"),
                lambda: a.copy_(torch.zeros(3)),
                lambda: a[[0, 1]],
                lambda: a[torch.arange(2)],
            ):
                with pytest.raises(HostWait):
                    copy()


def test_values_gradients_and_modules_are_those_of_the_cpu():
    x, layer = torch.randn(2, 4), torch.nn.Linear(4, 3)
    layer(x).square().sum().backward()
    expected = layer.weight.grad.clone()
    with FakeGPUs():
        module = torch.nn.Linear(4, 3)
        module.load_state_dict(layer.state_dict())
        module = module.to("cuda")
        assert str(module.weight.device) == "cuda:0"
        out = module(x.to("cuda"))
        out.square().sum().backward()
        assert str(module.weight.grad.device) == "cuda:0"
        with torch.device("cuda:1"):
            assert str(torch.nn.Linear(4, 3).weight.device) == "cuda:1"
    assert torch.equal(module.weight.grad, expected)


def test_allowed_places_are_counted():
    with FakeGPUs([f"tests/fake_gpu/test_stand_in.py:{test_allowed_places_are_counted.__name__}"]) as gpus:
        x = torch.full((3,), 2.0, device="cuda")
        assert x.sum().item() == 6.0
        assert x.tolist() == [2.0] * 3
        assert sum(gpus.waits.values()) == 2
