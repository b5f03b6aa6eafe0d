"""Copies of small tensors to the host that do not wait for the device."""

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Copy of a tensor's values to the host. The constructor does not wait; ``tolist`` and ``tensor`` wait for its end.

    On a CUDA device the copy is queued behind the work that computes the values, and an event marks the end of the
    copy. Call ``tolist`` or ``tensor`` after a later sync of the same device, or once ``is_complete`` is true: the copy
    is then complete, and they do not wait. On other devices they copy the values.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values.detach()
        self._copied: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            # this call allocates page-locked memory, the only kind to which the GPU can copy while the host continues
            self._values = self._values.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(values.device))

    @property
    def is_complete(self) -> bool:
        """Whether the values can be read without waiting for an event."""
        return self._copied is None or self._copied.query()

    def tensor(self) -> Tensor:
        """The values on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.cpu()

    def tolist(self) -> list[Any]:
        """The values as nested lists of numbers."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()
