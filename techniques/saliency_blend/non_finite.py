"""Tells of numbers in a blend that are none, whose they are and where they began.

One NaN of an expert spoils its whole prediction, wherever its mask lies: the softmax of its saliency is over all
positions, and the next step would spread it. So it is refused at positions that the expert does not paint too, with a
forced region as well, and never left to the base alone without a word.

No look waits for a GPU by itself: a prediction's few numbers stay there until the sampler's next level has been read,
which waits for all that was asked before, or until the finished latent is on the CPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

WIDER = "run it in a wider dtype (ComfyUI's --bf16-unet or --fp32-unet, --force-upcast-attention)"


def at_hand(numbers: Tensor) -> bool:
    """Whether a look at them waits for nothing."""
    return numbers.device.type == "cpu"


class FiniteWatch:
    """Follows the predictions of one run in their order. ``labels``: of the models, the base first."""

    def __init__(self, labels: Sequence[str]):
        self.labels = tuple(labels)
        self._sigma: float | None = None  # of the last prediction
        self._models: tuple[int, ...] = ()  # that took part in it; none where the base is alone
        self._numbers: Tensor | None = None  # of it: a sum of x, and of every model the partition of its samples
        self._before: str | None = None  # what was asked before it, as an error says it

    def asked(self, sigma: float, x: Tensor) -> None:
        """The next prediction is at ``sigma``, which was read from the device of ``x`` [B, C, *S]."""
        self._look()
        if self._sigma is not None:
            self._before = self._tell()
        self._sigma, self._models = sigma, ()
        self._keep(x.detach().sum(dtype=torch.float32).view(1))

    def answered(self, models: Sequence[int], partition: Tensor) -> None:
        """``partition`` [N, B T] of the blend: not finite where a prediction of ``models`` is not."""
        self._models = tuple(models)
        self._keep(torch.cat([self._numbers[:1], partition.detach().flatten()]))

    def finished(self, output: Tensor) -> None:
        """With the latent ``output``, on the CPU."""
        self._look()
        if self._sigma is not None and not bool(output.isfinite().all()):
            self._refuse(self._tell())

    def _keep(self, numbers: Tensor) -> None:
        self._numbers = numbers
        if at_hand(numbers):
            self._look(over=False)

    def _look(self, over: bool = True) -> None:
        if self._numbers is None:
            return
        seen, *partition = torch.isfinite(self._numbers).tolist()
        if over:
            self._numbers = None
        if not seen:
            self._refuse(self._before)
        size = len(partition) // max(1, len(self._models))
        for k, model in enumerate(self._models):
            if not all(partition[k * size : (k + 1) * size]):
                raise ValueError(
                    f"the prediction of '{self.labels[model]}' is not finite (NaN or infinite) at sigma {self._sigma:.4g};"
                    f" check that its conditioning fits its checkpoint, or {WIDER}"
                )

    def _tell(self) -> str:
        """What the last prediction, itself finite as far as is known, can have to do with a latent that is not."""
        if self._models:
            return (
                f"what was made of the blend at sigma {self._sigma:.4g} is not finite (NaN or infinite), though every model's"
                " prediction was: by guidance, a patch on the MODEL or the sampler; lower cfg, or remove the patches"
            )
        return (
            f"the prediction of '{self.labels[0]}', which paints alone at sigma {self._sigma:.4g}, or what a patch made of it,"
            f" is not finite (NaN or infinite); {WIDER}, or remove the patches"
        )

    @staticmethod
    def _refuse(told: str | None) -> None:
        raise ValueError(
            told
            or "the latent that the sampling begins with is not finite (NaN or infinite); use other noise or another"
            " latent_image"
        )
