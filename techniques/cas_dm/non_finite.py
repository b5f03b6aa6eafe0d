"""Tells whether a head, or the model before it, gave numbers that are none: a picture of them would only be black.

No look waits for a GPU by itself: two numbers of a prediction stay there until the next level has been read, which waits for
all that was asked before. The last level of a run is looked at on the spot, for the picture is needed next.
"""

import torch
from torch import Tensor

KEY = "chorus_cas_dm_watch"


def at_hand(numbers: Tensor) -> bool:
    """Whether a look at them waits for nothing."""
    return numbers.device.type == "cpu"


class HeadWatch:
    """All heads of one run, in the order in which they act. It lies in the run's own model_options, and ends with them."""

    def __init__(self, sigmas: Tensor | None):
        # below the last level but one nobody asks any more
        self._last = 0.0 if sigmas is None or len(sigmas) < 2 else float(sigmas[-2])
        self._kept: list[tuple[int, float, Tensor]] = []  # which head, level, sums before and after it

    @classmethod
    def of_run(cls, model_options: dict) -> "HeadWatch":
        if KEY not in model_options:
            model_options[KEY] = cls(model_options.get("transformer_options", {}).get("sample_sigmas"))
        return model_options[KEY]

    def saw(self, number: int, level: float, before: Tensor, after: Tensor) -> None:
        """x0 as it came to the head ``number`` (from 1), and as that made it, at ``level``."""
        sums = torch.stack([x.detach().sum(dtype=torch.float32) for x in (before, after)])
        self._kept.append((number, level, sums))
        if at_hand(sums) or level <= self._last:
            self.look()

    def look(self) -> None:
        """Refuse what was seen and is not finite; to be asked when a level has just been read from the device."""
        kept, self._kept = self._kept, []
        for number, level, sums in kept:
            before, after = sums.isfinite().tolist()
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
