"""Threads for experts on other devices than the base's."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import comfy.model_management
import torch

T = TypeVar("T")


class Workers:
    """One thread per additional device, so that the models on it compute at the same time as the base.

    A forward pass keeps its thread busy, by launching kernels on a GPU or by computing on the CPU. In a single thread,
    two devices would therefore mostly wait for each other.
    """

    def __init__(self) -> None:
        self._threads: dict[torch.device, ThreadPoolExecutor] = {}

    def submit(self, device: torch.device, function: Callable[[], T]) -> Future[T]:
        """Start ``function`` on the thread of ``device``, in the caller's inference and gradient mode."""
        if device not in self._threads:
            self._threads[device] = ThreadPoolExecutor(1, f"chorus {device}")
        inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

        def work() -> T:
            comfy.model_management.set_torch_device(device)
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
                return function()

        return self._threads[device].submit(work)

    def close(self) -> None:
        """Wait for running calls and end the threads."""
        for thread in self._threads.values():
            thread.shutdown(wait=True, cancel_futures=True)
        self._threads.clear()
