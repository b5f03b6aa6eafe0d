"""Distances of refined faces from the originals, and the reduction of changes whose distance exceeds a limit.

Shapes: N faces, S the side of a crop.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from kornia.metrics import ssim
from torch import Tensor

# (changed crops [n, 3, S, S], indices [n] of their originals in the original crops) -> distances [n] from the originals
Measure = Callable[[Tensor, Tensor], Tensor]
Guard = Callable[[Tensor], Measure]  # original crops [N, 3, S, S] -> Measure

HALVINGS = 8  # bisection steps


def limit_identity_change(
    crops: Tensor, changes: Tensor, measure: Measure, limit: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Returns a scale [N] for the changes of each face, and the distances [N] at scale 1 and at the returned scale.

    The distance of the face at the returned scale is at most ``limit``. All results are on the CPU.

    The scale is found by bisection. It is at most 2^-HALVINGS below the largest possible scale if the distance grows
    with the scale. A non-finite distance exceeds every limit.
    """

    def distances(scale: Tensor, rows: Tensor) -> Tensor:
        part = scale.to(crops).view(-1, 1, 1, 1) * changes[rows]
        return measure((crops[rows] + part).clamp(0.0, 1.0), rows).float()

    device = crops.device
    all_rows = torch.arange(len(crops), device=device)
    full = distances(torch.ones(len(crops), device=device), all_rows).cpu()
    scale, distance = torch.ones(len(crops)), full.clone()
    too_far = torch.arange(len(crops))[~(full <= limit)]
    if not len(too_far):
        return scale, (full, distance)
    far = too_far.to(device)
    low, high, found = (torch.full((len(far),), value, device=device) for value in (0.0, 1.0, 0.0))
    for _ in range(HALVINGS):  # all values stay on the device: to read one, the CPU would wait for the GPU
        middle = (low + high) / 2
        now = distances(middle, far)
        near = now <= limit
        low, found = torch.where(near, middle, low), torch.where(near, now, found)
        high = torch.where(near, high, middle)
    scale[too_far], distance[too_far] = low.cpu(), found.cpu()
    return scale, (full, distance)


def structure_guard(crops: Tensor) -> Measure:
    """A Measure that needs no network: 1 - mean SSIM of the changed and the original crop."""
    return lambda changed, rows: 1.0 - ssim(crops[rows], changed, window_size=11).mean((1, 2, 3))


def feature_guard(embed: Callable[[Tensor], Tensor]) -> Guard:
    """A Guard that measures 1 - cosine similarity of the embeddings of the changed and the original crop.

    ``embed``: crops [N, 3, S, S] -> embeddings [N, D].
    """

    def guard(crops: Tensor) -> Measure:
        original = F.normalize(embed(crops).float(), dim=1)
        return lambda changed, rows: 1.0 - (original[rows] * F.normalize(embed(changed).float(), dim=1)).sum(1)

    return guard
