"""Non-finite numbers end a training; the last state whose loss was finite is kept to go back to."""

from collections.abc import Sequence

import torch
from torch import Tensor


class NotFiniteError(ValueError):
    """The loss became NaN or infinite; the weights are those of the last finite loss."""

    @classmethod
    def at(cls, what: str, step: int, steps: int, learning_rate: float) -> "NotFiniteError":
        """For ``what`` at ``step`` (from 0) of ``steps``."""
        return cls(
            f"{what} is NaN or infinite at step {step + 1} of {steps}; lower the learning rate, {learning_rate:g}"
        )


@torch.no_grad()
def all_finite(values: Sequence[Tensor]) -> bool:
    """Whether every number of ``values``, of any shapes on one device, is finite; waits for the device once."""
    return bool(torch.stack([value.abs().amax() for value in values]).isfinite().all())


class LastFiniteState:
    """A copy of tensors that training changes in place, as they were after ``done`` steps."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.keep(0)

    def keep(self, done: int) -> None:
        self.done, self.copies = done, [t.detach().clone() for t in self.tensors]

    @torch.no_grad()
    def restore(self) -> int:
        """Put the copy back; returns the steps behind it."""
        torch._foreach_copy_(self.tensors, self.copies)
        return self.done
