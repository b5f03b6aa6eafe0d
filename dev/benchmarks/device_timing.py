"""Times functions on a GPU, eager and as CUDA graphs, or on a CPU; counts their launches.

Needs only torch. A function that is timed takes the number of the call, with which it chooses its inputs.
"""

import contextlib
import time
from collections.abc import Callable, Collection

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CALLS = 8  # calls per timing on a GPU, where a single call is too short for the clock


class CountOps(TorchDispatchMode):
    """Counts the dispatched ops except views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def launches(run: Callable, device: torch.device) -> int:
    """Number of kernels, copies and fills that one call launches on a GPU, or of ops that it dispatches on a CPU."""
    if device.type == "cpu":
        with CountOps() as counter:
            run(0)
        return counter.count
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):  # the first profile of a process may miss events
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            run(0)
            torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profiler.events())


class Constants(TorchFunctionMode):
    """Caches the results of ``torch.tensor``: a CUDA graph cannot capture copies from the CPU."""

    def __init__(self):
        super().__init__()
        self._made = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.tensor:
            return func(*args, **(kwargs or {}))
        key = repr((args, kwargs))
        if key not in self._made:
            self._made[key] = func(*args, **(kwargs or {}))
        return self._made[key]


def capture(run: Callable, cache_constants: bool) -> Callable | None:
    """The replay of a CUDA graph of ``CALLS`` calls. If capture fails, prints the reason and returns None."""
    constants = Constants() if cache_constants else contextlib.nullcontext()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with constants, torch.cuda.stream(side):
            for i in range(CALLS):
                run(i)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        with constants, torch.cuda.graph(graph):
            for i in range(CALLS):
                run(i)
    except RuntimeError as error:
        print(f"CUDA graph not captured: {error}", flush=True)
        return None

    def replay(constants: object = constants) -> None:  # the graph reads the constants, so they must stay alive
        graph.replay()

    return replay


def eager_gpu(run: Callable) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(CALLS):
        run(i)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / CALLS


def replayed(replay: Callable) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / CALLS


def eager_cpu(run: Callable, i: int) -> float:
    start = time.perf_counter()
    run(i)
    return time.perf_counter() - start


def time_all(
    runs: dict[str, Callable],
    device: torch.device,
    count: int,
    *,
    constants: bool = True,
    eager_only: Collection[str] = (),
) -> dict[str, dict[str, list[float]]]:
    """{implementation: {"eager" or "graph" (GPU only): seconds per call}}, with ``count`` timings of each.

    ``constants``: whether CUDA graphs are captured with cached results of ``torch.tensor``, see ``Constants``.
    ``eager_only``: names of the implementations without a CUDA graph.
    """
    cuda = device.type == "cuda"
    graphs = {n: capture(run, constants) if cuda and n not in eager_only else None for n, run in runs.items()}
    times = {name: {"eager": [], "graph": []} for name in runs}
    for i in range(-5, count):  # five warm-up rounds
        for name, run in runs.items():
            eager = eager_gpu(run) if cuda else eager_cpu(run, i)
            graph = replayed(graphs[name]) if graphs[name] else None
            if i >= 0:
                times[name]["eager"].append(eager)
                times[name]["graph"] += [] if graph is None else [graph]
    return times
