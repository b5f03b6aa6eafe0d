"""Raises an error on non-finite predictions of a Cas-DM head or of the model before it.

Such predictions decode to black images.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...common.finite import WIDER_DTYPE, DeferredChecks
from ...common.shapes import named_samples

KEY = "chorus_cas_dm_finite"


class HeadFiniteCheck:
    """Checks all heads of one run in order. Stored in the model_options of the run."""

    def __init__(self, sigmas: Tensor | None) -> None:
        # the last prediction of a run is at the last but one sigma; its check runs at once, since no other follows
        self._last = 0.0 if sigmas is None or len(sigmas) < 2 else float(sigmas[-2])
        self._checks = DeferredChecks()

    @classmethod
    def of_run(cls, model_options: dict[str, Any]) -> "HeadFiniteCheck":
        """The check of the run with ``model_options``, created at the first call."""
        if KEY not in model_options:
            model_options[KEY] = cls(model_options.get("transformer_options", {}).get("sample_sigmas"))
        return model_options[KEY]

    def add(self, number: int, level: float, before: Tensor, after: Tensor) -> None:
        """Add a deferred check of x0 before and after head ``number`` (counted from 1) at the sigma ``level``."""
        sums = torch.cat([x.detach().flatten(1).sum(1, dtype=torch.float32) for x in (before, after)])
        self._checks.add(sums, partial(_raise_if_non_finite, number, level))
        if level <= self._last:
            self.flush()

    def flush(self) -> None:
        """Run the deferred checks. Call it after a device sync, so that it need not wait."""
        self._checks.flush()


def _raise_if_non_finite(number: int, level: float, finite: list[bool]) -> None:
    """``finite``: of each sample before the head, then of each sample after it."""
    samples = len(finite) // 2
    before, after = finite[:samples], finite[samples:]

    def place(rows: list[bool]) -> str:
        return "" if samples == 1 else f" in {named_samples(i for i, one in enumerate(rows) if not one)}"

    if not all(before):
        raise ValueError(
            f"the prediction of the model is not finite (NaN or infinite) at sigma {level:.4g}{place(before)}, before"
            f" Cas-DM head {number}; check that the conditioning fits the checkpoint, or {WIDER_DTYPE}"
        )
    if not all(after):
        raise ValueError(
            f"the output of Cas-DM head {number} is not finite (NaN or infinite) at sigma {level:.4g}{place(after)}, for a"
            " finite prediction of the model; lower its strength, narrow its window, or train it again"
        )
