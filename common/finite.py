"""Checks for non-finite values that do not cause a device sync.

Reading a value from a GPU waits for all work queued before it. The results are therefore copied to the host without
waiting, and read after a sync that happens anyway, for example when the next noise level is read. Values on the CPU are
checked at once.
"""

from collections.abc import Callable

from torch import Tensor

from .host_copy import HostCopy

# the remedy in errors about non-finite predictions
WIDER_DTYPE = "run the model in a wider dtype (ComfyUI's --bf16-unet or --fp32-unet, --force-upcast-attention)"


def is_on_cpu(values: Tensor) -> bool:
    """Whether ``values`` can be read without a device sync."""
    return values.device.type == "cpu"


class DeferredChecks:
    """Queue of values to check, each with a callback for the result."""

    def __init__(self) -> None:
        self._pending: list[tuple[HostCopy, Callable[[list[bool]], None]]] = []

    def add(self, values: Tensor, callback: Callable[[list[bool]], None]) -> None:
        """Call ``callback`` with a list of N booleans: whether each of ``values`` [N] is finite.

        On the CPU ``callback`` is called at once, otherwise in ``flush``.
        """
        self._pending.append((HostCopy(values.isfinite()), callback))
        if is_on_cpu(values):
            self.flush()

    def flush(self) -> None:
        """Run the queued checks in order. Call it right after a device sync."""
        pending, self._pending = self._pending, []
        for finite, callback in pending:
            callback(finite.tolist())
