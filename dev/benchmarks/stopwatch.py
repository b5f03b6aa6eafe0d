"""Times sampling runs and the forward passes in them, and computes medians with intervals."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..quartiles import quartiles
from ..statistics import bootstrap


@dataclass(frozen=True)
class Timing:
    """Times of one run, in seconds."""

    seconds: float  # the whole run
    forwards: float  # in the networks' forward passes
    batches: tuple[int, ...]  # batch size of each forward pass

    @property
    def between(self) -> float:
        """Seconds outside the forward passes."""
        return self.seconds - self.forwards


class Stopwatch:
    """Times runs that call ``networks``. A GPU is synchronised only at both ends of a run; events time the passes."""

    def __init__(self, networks: list[torch.nn.Module], device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks, self._batches = [], []
        self._handles = []
        for network in networks:
            self._handles.append(network.register_forward_pre_hook(self._enter))
            self._handles.append(network.register_forward_hook(lambda *_: self._mark()))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def time(self, run: Callable) -> Timing:
        self._marks, self._batches = [], []
        whole = seconds(run, self._cuda)
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        forwards = sum(a.elapsed_time(b) / 1000 if self._cuda else b - a for a, b in pairs)
        return Timing(whole, forwards, tuple(self._batches))

    def _enter(self, network, args) -> None:
        self._batches.append(args[0].shape[0])
        self._mark()

    def _mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())


def seconds(run: Callable[[], object], cuda: bool) -> float:
    """Seconds of a run; a GPU is synchronised at both ends."""
    gc.collect()  # so that earlier garbage is not collected during the run
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median(values: list[float]) -> dict:
    """Median, quartiles, and the 95 % bootstrap interval of the median."""
    first, middle, third = quartiles(values)
    interval = bootstrap([np.array(values)], np.median)
    return {"median": middle, "quartiles": [first, third], "interval": list(interval)}
