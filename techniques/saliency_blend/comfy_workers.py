"""Threads for the models of a run that were placed on another device than the base."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import comfy.model_management
import torch

T = TypeVar("T")


class Workers:
    """One thread for each further device, so that what is placed there computes while the base does.

    A forward pass keeps its thread busy launching kernels (a GPU) or computing (the CPU): asked one after the other,
    two devices would mostly wait for each other.
    """

    def __init__(self) -> None:
        self._threads: dict[torch.device, ThreadPoolExecutor] = {}

    def submit(self, device: torch.device, function: Callable[[], T]) -> Future[T]:
        """Start ``function`` on the thread of ``device``; inference and gradient mode belong to threads and go along."""
        if device not in self._threads:
            self._threads[device] = ThreadPoolExecutor(1, f"chorus {device}")
        inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

        def work() -> T:
            comfy.model_management.set_torch_device(device)
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
                return function()

        return self._threads[device].submit(work)

    def close(self) -> None:
        """Wait for what is under way and end the threads."""
        for thread in self._threads.values():
            thread.shutdown(wait=True, cancel_futures=True)
        self._threads.clear()
