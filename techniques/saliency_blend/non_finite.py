"""Refuses non-finite numbers in a blend, and says which model they came from and at which step.

One NaN of an expert spoils its whole prediction, wherever its mask lies: the softmax of its saliency is over all
positions, and the next step would spread it. So it is refused at positions that the expert does not win too, with a
forced region as well, and never left to the base alone in silence.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...common.finite import DeferredChecks

WIDER = "run it in a wider dtype (ComfyUI's --bf16-unet or --fp32-unet, --force-upcast-attention)"
FIRST = (
    "the latent that the sampling begins with is not finite (NaN or infinite); use other noise or another latent_image"
)


class BlendFiniteCheck:
    """Checks the predictions of one run in their order. ``labels``: of the models, the base first."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self._checks = DeferredChecks()
        self._sigma: float | None = None  # of the last prediction
        self._models: tuple[int, ...] = ()  # that took part in it; empty where the base is alone

    def before(self, sigma: float, x: Tensor) -> None:
        """A prediction of ``x`` [B, C, *S] begins at ``sigma``, which was just read from the device of ``x``."""
        self._checks.flush()
        # x comes of the last prediction, which was finite as far as is known
        cause = FIRST if self._sigma is None else self._cause()
        self._sigma, self._models = sigma, ()
        self._checks.add(x.detach().sum(dtype=torch.float32).view(1), partial(_refuse_unless_all, cause))

    def after(self, models: Sequence[int], partition: Tensor) -> None:
        """``partition`` [N, B T] of the blend of ``models``: not finite where a model's prediction is not."""
        assert self._sigma is not None  # before() told it
        self._models = tuple(models)
        self._checks.add(partition.flatten(), partial(self._examine, self._models, self._sigma))

    def finish(self, output: Tensor) -> None:
        """The run ended with the latent ``output``, on the CPU."""
        self._checks.flush()
        if self._sigma is not None:
            _refuse_unless_all(self._cause(), [bool(output.isfinite().all())])

    def _examine(self, models: tuple[int, ...], sigma: float, finite: list[bool]) -> None:
        size = len(finite) // len(models)
        for slot, model in enumerate(models):
            _refuse_unless_all(
                f"the prediction of '{self.labels[model]}' is not finite (NaN or infinite) at sigma {sigma:.4g};"
                f" check that its conditioning fits its checkpoint, or {WIDER}",
                finite[slot * size : (slot + 1) * size],
            )

    def _cause(self) -> str:
        """How the last prediction, itself finite as far as is known, can have led to a latent that is not."""
        if self._models:
            return (
                f"what was made of the blend at sigma {self._sigma:.4g} is not finite (NaN or infinite), though every model's"
                " prediction was: by guidance, a patch on the MODEL or the sampler; lower cfg, or remove the patches"
            )
        return (
            f"the prediction of '{self.labels[0]}', which acts alone at sigma {self._sigma:.4g}, or what a patch made of it,"
            f" is not finite (NaN or infinite); {WIDER}, or remove the patches"
        )


def _refuse_unless_all(message: str, finite: list[bool]) -> None:
    if not all(finite):
        raise ValueError(message)
