"""How far a face is from what it was, and how much of a change keeps it within a limit.

Shapes: N faces, S the side of a crop.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from kornia.metrics import ssim
from torch import Tensor

Measure = Callable[[Tensor, Tensor], Tensor]  # distances [n] of changed crops [n, 3, S, S] from the crops of those rows
Guard = Callable[[Tensor], Measure]  # from the crops [N, 3, S, S] as they are

HALVINGS = 8  # of the strength, in search of the limit


def hold_identity(
    crops: Tensor, changes: Tensor, measure: Measure, limit: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The share [N] of each face's changes that keeps its distance within ``limit``; the distances [N] at 1 and there.

    By halving: the share is at most 2^-HALVINGS below the largest, where distance grows with it. A distance that is no
    number counts as too far.
    """

    def distances(share: Tensor, rows: Tensor) -> Tensor:
        part = share.to(crops).view(-1, 1, 1, 1) * changes[rows]
        return measure((crops[rows] + part).clamp(0.0, 1.0), rows).float().cpu()

    everyone = torch.arange(len(crops))
    low, full = torch.ones(len(crops)), distances(torch.ones(len(crops)), everyone)
    found = full.clone()
    far = everyone[~(full <= limit)]
    if not len(far):
        return low, (full, found)
    low[far], found[far] = 0.0, 0.0
    high = torch.ones(len(far))
    for _ in range(HALVINGS):
        middle = (low[far] + high) / 2
        now = distances(middle, far)
        near = now <= limit
        low[far], found[far] = torch.where(near, middle, low[far]), torch.where(near, now, found[far])
        high = torch.where(near, high, middle)
    return low, (full, found)


def structure_guard(crops: Tensor) -> Measure:
    """1 - SSIM (its mean over the crop): needs no network."""
    return lambda changed, rows: 1.0 - ssim(crops[rows], changed, window_size=11).mean((1, 2, 3))


def feature_guard(embed: Callable[[Tensor], Tensor]) -> Guard:
    """1 - cosine of what ``embed`` makes of crops [N, 3, S, S]: [N, D]."""

    def guard(crops: Tensor) -> Measure:
        known = F.normalize(embed(crops).float(), dim=1)
        return lambda changed, rows: 1.0 - (known[rows] * F.normalize(embed(changed).float(), dim=1)).sum(1)

    return guard
