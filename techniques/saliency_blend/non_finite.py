"""Checks a blend for non-finite predictions; the errors name the model and the step.

One NaN anywhere makes the whole prediction of an expert unusable, because the softmax of its saliency includes all
positions. A NaN is therefore an error even at positions that the expert does not win, or outside a forced region. The
blend never falls back to the base alone.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...common.finite import WIDER_DTYPE, DeferredChecks
from ...common.shapes import named_samples

FIRST = (
    "the latent that the sampling begins with is not finite (NaN or infinite); use other noise or another latent_image"
)


class BlendFiniteCheck:
    """Checks the predictions of one run in order. ``labels``: the models' names, the base first."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self._checks = DeferredChecks()
        self._sigma: float | None = None  # of the last prediction
        self._samples = 1  # B
        self._models: tuple[int, ...] = ()  # the models of the last prediction; empty if only the base took part

    def before(self, sigma: float, x: Tensor) -> None:
        """Check the latent ``x`` [B, C, *S] before a prediction at ``sigma``. Call it right after a device sync."""
        self._checks.flush()
        # x results from the last prediction, which has passed its check by now
        cause = FIRST if self._sigma is None else self._cause()
        self._sigma, self._models, self._samples = sigma, (), len(x)
        self._checks.add(x.detach().sum(dtype=torch.float32).view(1), partial(_refuse_unless_all, cause))

    def after(self, models: Sequence[int], partition: Tensor) -> None:
        """Check ``partition`` [N, B T] of a blend of ``models``: a model's row is non-finite if its prediction is."""
        assert self._sigma is not None  # before() comes first
        self._models = tuple(models)
        self._checks.add(partition.flatten(), partial(self._examine, self._models, self._sigma))

    def finish(self, output: Tensor) -> None:
        """Check the finished latent ``output``, on the CPU."""
        self._checks.flush()
        if self._sigma is not None:
            _refuse_unless_all(self._cause(), [bool(output.isfinite().all())])

    def _examine(self, models: tuple[int, ...], sigma: float, finite: list[bool]) -> None:
        size = len(finite) // len(models)
        for slot, model in enumerate(models):
            rows = finite[slot * size : (slot + 1) * size]
            if not all(rows):
                raise ValueError(
                    f"the prediction of '{self.labels[model]}' is not finite (NaN or infinite) at sigma"
                    f" {sigma:.4g}{self._place(rows)}; check that its conditioning fits its checkpoint, or {WIDER_DTYPE}"
                )

    def _place(self, finite: list[bool]) -> str:
        """The samples that are not finite, if there are several samples. ``finite``: of each sample and frame [B T]."""
        if self._samples == 1:
            return ""
        frames = len(finite) // self._samples
        return f" in {named_samples({i // frames for i, one in enumerate(finite) if not one})}"

    def _cause(self) -> str:
        """The error message for a latent that is non-finite although the last prediction passed its check."""
        if self._models:
            return (
                f"the latent after the blend at sigma {self._sigma:.4g} is not finite (NaN or infinite), although every"
                " model's prediction is finite; the cause is guidance, a patch on the MODEL or the sampler: lower cfg,"
                " or remove the patches"
            )
        return (
            f"the prediction of '{self.labels[0]}' at sigma {self._sigma:.4g}, where no expert takes part, is not"
            f" finite (NaN or infinite), or a patch made it non-finite; {WIDER_DTYPE}, or remove the patches"
        )


def _refuse_unless_all(message: str, finite: list[bool]) -> None:
    if not all(finite):
        raise ValueError(message)
