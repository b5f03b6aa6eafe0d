"""The progress bar of SeedSelect, with the best image so far."""

from collections.abc import Callable

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...host.sampling_progress import SamplingProgress
from .select import SeedSelect

InterruptProcessingException = comfy.model_management.InterruptProcessingException


class SelectProgress(SamplingProgress):
    """Progress of a run of ``select``, with the best score so far and its image."""

    def __init__(self, select: SeedSelect, model: ModelPatcher, decode: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model, 1)
        self._select, self._decode = select, decode
        self._shown: Tensor | None = None  # latent of the best image

    def callback(self, step: int, x0: Tensor, x: Tensor, total_steps: int) -> None:
        """Count one step; until there is a best image, show the estimate of x0."""
        self.bar.total = self._select.planned
        if self._shown is None:
            super().callback(step, x0, x, total_steps)
        else:
            self.show(steps=1)

    def __call__(
        self,
        done: int,
        total: int,
        score: float,
        latent: Callable[[], Tensor],
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Show the best image and score so far; used as a ``records.Progress``.

        ``decode``: decoder for this call; default: that of the constructor.
        """
        self.bar.total = total
        best, image = latent(), None
        if best is not self._shown:
            with torch.no_grad():
                self._shown, image = best, (decode or self._decode)(best)[0]
        self.show(image, done - self.done, f"best score {score:.4f}, {done} of {total} model evaluations")
