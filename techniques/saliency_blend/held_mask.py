"""mask_refresh: whether a prediction uses the last computed mask again, and which models it then needs.

A mask changes slowly over the steps, but computing it needs the conditional and the unconditional prediction of every
model. With a held mask, a model is evaluated only if it generates at least one position, and only with the
conditionings that the sampler asks for: at cfg 1 that is one forward pass for each model instead of two.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...common.host_copy import HostCopy
from .experts import Participant


class HeldMask:
    """The last computed mask of a run. ``every``: a mask is computed in every n-th interval between two sampling sigmas."""

    def __init__(self, every: int) -> None:
        self._every = every
        self.weights: Tensor | None = None  # see kernels.saliency_blend.Blend.weights
        self.models: tuple[int, ...] = ()  # indices of the models, in the order of the weights
        self._group = -1
        self._generates: HostCopy | None = None  # for each of ``models``, whether it generates at least one position

    def keep(self, models: Sequence[Participant], weights: Tensor, interval: int) -> None:
        """Store the mask ``weights`` of ``models``, computed in ``interval``."""
        if self._every == 1:
            return
        self.weights, self._group = weights, interval // self._every
        self.models = tuple(m.index for m in models)
        each = [weights == slot for slot in range(len(models))] if weights.dtype == torch.uint8 else weights > 0.0
        # copied to the host in the meantime, so that sampling does not wait for it
        self._generates = HostCopy(torch.stack([one.any() for one in each]))

    def generating(self, models: Sequence[Participant], interval: int) -> set[int] | None:
        """Indices of the models that generate in the held mask; None if the mask of ``interval`` must be computed.

        It is computed in the first prediction of every n-th interval, and whenever other ``models`` take part than in
        the last computed mask.
        """
        if self._every == 1 or self._generates is None or interval // self._every != self._group:
            return None
        if tuple(m.index for m in models) != self.models:
            return None
        return {index for index, found in zip(self.models, self._generates.tolist(), strict=True) if found}
