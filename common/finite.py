"""Checks for non-finite numbers that do not wait for the GPU.

Reading a number from a GPU waits for all work queued before it. So the numbers of a prediction stay on the device until
something else has waited for it, as the sampler does when it reads the next noise level; on the CPU they are read at once.
"""

from collections.abc import Callable

from torch import Tensor


def is_on_cpu(numbers: Tensor) -> bool:
    """Whether reading them waits for nothing."""
    return numbers.device.type == "cpu"


class DeferredChecks:
    """Numbers with what to do once they can be read."""

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, Callable[[list[bool]], None]]] = []

    def add(self, numbers: Tensor, examine: Callable[[list[bool]], None]) -> None:
        """Call ``examine`` with whether each of ``numbers`` [N] is finite: at once on the CPU, else in ``flush``."""
        self._pending.append((numbers.detach(), examine))
        if is_on_cpu(numbers):
            self.flush()

    def flush(self) -> None:
        """Examine what was added, in that order. Call it where the device has just been waited for."""
        pending, self._pending = self._pending, []
        for numbers, examine in pending:
            examine(numbers.isfinite().tolist())
