"""``bench gpu`` on a GPU: everything that is timed is on the device, and can be captured in a CUDA graph."""

import contextlib

import pytest
import torch
from torch import nn

from chorus.dev.benchmarks import gpu_kernels, gpu_networks
from chorus.tests.support.blend_cases import CASES
from chorus.tests.support.fake_gpu import FakeGPUs, HostWait
from chorus.tests.support.tiers import quick

# outside of the timed functions: results are read for the comparison, and weights are checked when they are loaded
OUTSIDE = (
    "dev/benchmarks/gpu_networks.py:time_ways",
    "dev/benchmarks/gpu_kernels.py:check_linear",
    "dev/benchmarks/gpu_kernels.py:exact_blend",
    "common/weights.py:weight_error",
)
NETWORKS = {section.name: section.run for section in gpu_networks.sections(torch.device("cuda"), smoke=True)}


@pytest.fixture
def gpus(one_thread, monkeypatch):
    """Fake GPUs, on which every timed function runs once where it may not wait; compiled functions run uncompiled."""
    gpus = FakeGPUs(OUTSIDE)
    gpus.timed = []

    def time_all(runs, device, count, constants, eager_only):
        for name, run in runs.items():
            with contextlib.nullcontext() if name in eager_only else gpus.steps():
                assert run(1).device.type == "cuda", name
            gpus.timed.append(name)
        return {name: {"eager": [1.0], "graph": [1.0]} for name in runs}

    monkeypatch.setattr(gpu_networks, "time_all", time_all)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: None)
    return gpus


# the first test that uses diffusers takes two seconds to import it
@pytest.mark.parametrize("name", quick([name for name in NETWORKS if "refiner" in name or "head" in name], NETWORKS))
def test_networks_are_on_the_device_and_do_not_wait(name, gpus):
    with gpus:
        found = NETWORKS[name]()
    assert gpus.timed == [row["way"] for row in found["rows"]]
    assert len(gpus.timed) + len(found["absent"]) == (2 if "head" in name else 3 if "VQ" not in name else 4)
    assert set(found["absent"]) <= {gpu_networks.DIFFUSERS}


def test_waiting_network_is_found(gpus):
    def waits(i):
        return x * x.sum().item()

    with gpus, pytest.raises(HostWait):
        x = torch.ones(3, device="cuda")
        gpus.allowed |= {"tests/fake_gpu/test_bench_gpu.py:waits"}
        gpu_networks.time_ways([gpu_networks.Way("a", torch.float32, lambda: waits)], 3 * x, torch.device("cuda"))


def test_errors_of_kernels_on_the_device_are_computed(gpus, monkeypatch):
    monkeypatch.setattr(gpu_kernels, "LINEAR_SHAPES", [(3, 16, 8)])
    monkeypatch.setattr(gpu_kernels.blend_kernel, "_obstacle", lambda like, models: "fake GPUs run no Triton")
    monkeypatch.setattr(
        gpu_kernels, "errors", lambda out, exact, *given: {"device": (float(out.cond.device.type != "cuda"), 0.0)}
    )
    with gpus:
        assert all(row["correct"] for row in gpu_kernels.check_linear("cuda")["rows"])
        found = gpu_kernels.check_blend(torch.device("cuda"), CASES)
    assert all(row["correct"] for row in found["rows"])
    assert found["absent"] == {"Triton": "fake GPUs run no Triton"}
