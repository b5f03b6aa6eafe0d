"""Checks that end a training on non-finite values, and a copy of its last finite state."""

from collections.abc import Sequence

import torch
from torch import Tensor


class NotFiniteError(ValueError):
    """A value of the training is NaN or infinite; the weights are those of the last finite loss."""

    @classmethod
    def at(cls, what: str, step: int, steps: int, learning_rate: float) -> "NotFiniteError":
        """The error that ``what`` is not finite at ``step`` (counted from 0) of ``steps``."""
        return cls(
            f"{what} is not finite (NaN or infinite) at step {step + 1} of {steps}; lower the learning rate (now {learning_rate:g})"
        )


@torch.no_grad()
def read_if_finite(values: Sequence[Tensor], numbers: Sequence[Tensor] = ()) -> list[float] | None:
    """Returns ``numbers``, tensors of one element, as floats if all ``values`` are finite, else None.

    ``values`` may have any shapes. All tensors must be on one device, which is read only once.
    """
    finite = torch.stack([value.abs().amax() for value in values]).isfinite().all()
    read = torch.cat([finite.float().view(1), *(number.detach().view(1) for number in numbers)]).tolist()
    return read[1:] if read[0] else None


class LastFiniteState:
    """A copy, taken after ``done`` steps, of tensors that training changes in place."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.keep(0)

    def keep(self, done: int) -> None:
        """Copy the tensors as they are after ``done`` steps."""
        self.done, self.copies = done, [t.detach().clone() for t in self.tensors]

    @torch.no_grad()
    def restore(self) -> int:
        """Copy the saved values back; returns the number of steps after which they were saved."""
        torch._foreach_copy_(self.tensors, self.copies)
        return self.done
