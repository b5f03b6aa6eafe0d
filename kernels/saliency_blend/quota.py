"""Assigns a fixed number of positions to an expert: those where its lead is largest.

The operations are plain torch and run between two passes of a kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import BELOW

INF = float("inf")


def assign_quotas(
    quota: Sequence[Tensor | int | None],
    bias: Sequence[float],
    region: Sequence[Tensor | None],
    scores: Sequence[Tensor],
    spread: Tensor,
    hard: bool,
) -> tuple[list[float], list[Tensor | None]]:
    """New ``bias`` and ``region``, with which every expert that has a quota gets its number of positions.

    See ``saliency_blend`` for ``quota``, ``bias`` and ``region``. ``scores``: [B, *S] of each model.
    ``spread``: [N, B T]. ``hard``: whether the mask is hard. The CPU does not wait for the GPU.
    """
    bias, region = list(bias), list(region)
    taken: Tensor | None = None
    for i, wanted in enumerate(quota):
        if wanted is None:
            continue
        bias[i] = 0.0
        unit = spread[i].unsqueeze(1)  # [B T, 1]
        lead = (scores[i] - scores[0]).reshape(len(unit), -1)
        if (added := region[i]) is not None:
            added = added.expand(scores[i].shape).reshape(lead.shape)
            lead = lead + torch.where(added.isinf(), added, added * unit)
        if hard:
            lead = lead if taken is None else lead.masked_fill(taken, -INF)
            chosen = _largest(lead, wanted)
            taken = chosen if taken is None else taken | chosen
            region[i] = torch.where(chosen, INF, -INF).view_as(scores[i])
        else:
            threshold = _threshold(lead, wanted) / torch.where(unit > 0.0, unit, 1.0)
            region[i] = (-threshold if added is None else added - threshold).expand(lead.shape).reshape(scores[i].shape)
    return bias, region


def _ranked(lead: Tensor, quota: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
    """``lead`` [B, P] in descending order, and two counts [B, 1].

    The first count is the number of values above -inf. The second is the number of these that the quota includes.
    """
    ordered = torch.sort(lead, dim=1, descending=True).values
    finite = (lead > -INF).sum(1, keepdim=True)
    wanted = quota.unsqueeze(1) if isinstance(quota, Tensor) else torch.full_like(finite, quota)
    return ordered, finite, torch.minimum(wanted, finite)


def _largest(lead: Tensor, quota: Tensor | int) -> Tensor:
    """A bool map [B, P] of the ``quota`` largest values of each row of ``lead`` [B, P]; -inf is never chosen.

    Of equal values, the first ones are taken.
    """
    ordered, _, count = _ranked(lead, quota)
    last = ordered.gather(1, (count - 1).clamp(min=0))
    above, equal = lead > last, lead == last
    return (above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))) & (count > 0)


def _threshold(lead: Tensor, quota: Tensor | int) -> Tensor:
    """The threshold [B, 1] above which ``quota`` values lie in each row of ``lead``, halfway to the next smaller value.

    It is inf for a quota of 0, and a little below all values for a quota that includes them all.
    """
    ordered, finite, count = _ranked(lead, quota)
    last = ordered.gather(1, (count - 1).clamp(min=0))
    following = ordered.gather(1, torch.minimum(count, finite - 1).clamp(min=0))
    following = torch.where(count < finite, following, last - BELOW * (ordered[:, :1] - last))
    return torch.where(count > 0, 0.5 * (last + following), INF)
