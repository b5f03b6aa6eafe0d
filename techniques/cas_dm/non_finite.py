"""Refuses non-finite numbers of Cas-DM heads, or of the model before them: their image would only be black."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...common.finite import DeferredChecks

KEY = "chorus_cas_dm_finite"


class HeadFiniteCheck:
    """Checks all heads of one run, in the order in which they act. Lies in the run's own model_options, and ends with them."""

    def __init__(self, sigmas: Tensor | None) -> None:
        # below the last level but one there is no further prediction, and the image is needed next
        self._last = 0.0 if sigmas is None or len(sigmas) < 2 else float(sigmas[-2])
        self._checks = DeferredChecks()

    @classmethod
    def of_run(cls, model_options: dict[str, Any]) -> "HeadFiniteCheck":
        if KEY not in model_options:
            model_options[KEY] = cls(model_options.get("transformer_options", {}).get("sample_sigmas"))
        return model_options[KEY]

    def add(self, number: int, level: float, before: Tensor, after: Tensor) -> None:
        """x0 before and after the head ``number`` (from 1) at ``level``."""
        sums = torch.stack([x.detach().sum(dtype=torch.float32) for x in (before, after)])
        self._checks.add(sums, partial(_examine, number, level))
        if level <= self._last:
            self.flush()

    def flush(self) -> None:
        """Examine what was added; to be called where a level has just been read from the device."""
        self._checks.flush()


def _examine(number: int, level: float, finite: list[bool]) -> None:
    before, after = finite
    if not before:
        raise ValueError(
            f"what the model predicts is not finite (NaN or infinite) at sigma {level:.4g}, before Cas-DM head"
            f" {number} has seen it; check that the conditioning fits the checkpoint, or run it in a wider dtype"
            " (ComfyUI's --bf16-unet or --fp32-unet, --force-upcast-attention)"
        )
    if not after:
        raise ValueError(
            f"what Cas-DM head {number} made of a finite prediction is not finite (NaN or infinite) at sigma"
            f" {level:.4g}; lower its strength or narrow its window, or train it anew"
        )
