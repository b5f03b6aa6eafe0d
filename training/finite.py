"""What ends a training: a number that is none. And the way back to the weights that were still good."""

from collections.abc import Sequence

import torch
from torch import Tensor


class NotFiniteError(ValueError):
    """The loss became NaN or infinite; the trainer holds the weights of the last loss that was a number."""

    @classmethod
    def at(cls, what: str, step: int, steps: int, learning_rate: float) -> "NotFiniteError":
        """For ``what`` at ``step`` (from 0) of ``steps``."""
        return cls(
            f"{what} is NaN or infinite at step {step + 1} of {steps}; lower the learning rate, {learning_rate:g}"
        )


@torch.no_grad()
def all_finite(values: Sequence[Tensor]) -> bool:
    """Whether every number of ``values``, of any shapes on one device, is one; waits for the device once."""
    return bool(torch.stack([value.abs().amax() for value in values]).isfinite().all())


class LastGood:
    """A copy of some tensors that are changed in place, as they were after so many steps."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = list(tensors)
        self.keep(0)

    def keep(self, done: int) -> None:
        self.done, self.copies = done, [t.detach().clone() for t in self.tensors]

    @torch.no_grad()
    def restore(self) -> int:
        """Put the copy back; the steps that it has seen."""
        torch._foreach_copy_(self.tensors, self.copies)
        return self.done
