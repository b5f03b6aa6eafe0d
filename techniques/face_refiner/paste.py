"""Cropping windows of an image at the scale of a network, and pasting the changes back.

Shapes: N windows, S the side of a crop, H and W pixels of an image, h and w pixels of a window inside the image.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from kornia.geometry.transform import resize
from scipy.ndimage import distance_transform_cdt
from torch import Tensor

from .boxes import Window

Sides = tuple[bool, bool, bool, bool]  # left, right, above, below


def crop(image: Tensor, window: Window, size: int) -> Tensor:
    """The window of an image [H, W, 3], resized to [1, 3, S, S]. Beyond the image it is filled as in ``extend``."""
    result = image[window.inside].movedim(-1, 0).unsqueeze(0).float()
    result = extend(result, window.overhang)
    return scaled(result, (size, size)).clamp(0.0, 1.0)


def extend(x: Tensor, overhang: tuple[int, int, int, int]) -> Tensor:
    """``x`` [N, C, H, W] padded left, right, above and below.

    The padding mirrors ``x`` as far as possible, then replicates its edge.
    """
    height, width = x.shape[-2:]
    mirrored = [min(n, length - 1) for n, length in zip(overhang, (width, width, height, height))]
    if any(mirrored):
        x = F.pad(x, mirrored, mode="reflect")
    rest = [n - m for n, m in zip(overhang, mirrored)]
    return F.pad(x, rest, mode="replicate") if any(rest) else x


def scaled(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[-2:] == size else resize(x, size, interpolation="bilinear", align_corners=False, antialias=True)


def edges(height: int, width: int, feather: int, sides: Sides = (True, True, True, True)) -> Tensor:
    """A weight [height, width]: 1 inside, falling to 1 / (feather + 1) at each side whose entry in ``sides`` is True."""

    def ramp(length: int, begin: bool, end: bool) -> Tensor:
        pixels = torch.arange(length, dtype=torch.float32)
        width = min(feather, max((length - 1) // 2, 0))  # keeps the middle at 1
        rising = torch.where(torch.tensor(begin), (pixels + 1) / (width + 1), 1.0)
        falling = torch.where(torch.tensor(end), (length - pixels) / (width + 1), 1.0)
        return torch.minimum(rising, falling).clamp(max=1.0)

    left, right, above, below = sides
    return ramp(height, above, below)[:, None] * ramp(width, left, right)


def ramp(mask: Tensor, feather: int) -> Tensor:
    """A mask [H, W] that falls over ``feather`` pixels inside its edge; the image border is not an edge."""
    mask = torch.nan_to_num(mask.float()).clamp(0.0, 1.0)
    inside = (mask > 0.0).cpu().numpy()
    if inside.all():  # without an edge there is no distance
        return mask
    depth = torch.from_numpy(distance_transform_cdt(inside, metric="chessboard")).to(mask)
    return mask * depth.clamp(max=feather + 1) / (feather + 1)


def weight(window: Window, feather: int, limit: Tensor | None, framed: bool) -> Tensor:
    """The paste weight [h, w] of a window, multiplied by ``limit`` [H, W] if given.

    If ``framed``, the weight is feathered at the window's edges, except at the image border.
    """
    rows, columns = window.inside
    size = rows.stop - rows.start, columns.stop - columns.start
    sides = columns.start > 0, columns.stop < window.width, rows.start > 0, rows.stop < window.height
    result = edges(*size, feather, sides) if framed else torch.ones(size)
    return result if limit is None else result.to(limit) * limit[window.inside]


def paste(image: Tensor, parts: Sequence[tuple[Window, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The image [H, W, 3] with the changes added, and the mask [H, W]: the sum of all weights, clamped to 1.

    ``parts``: for each face its window, the paste weight [h, w] and the change [3, S, S]. Where windows overlap, their
    changes are averaged, so that the order of the faces does not matter.
    """
    total, mask = image.new_zeros(image.shape, dtype=torch.float32), image.new_zeros(image.shape[:2]).float()
    for window, face_weight, change in parts:
        left, _, above, _ = window.overhang
        rows, columns = window.inside
        large = scaled(change.unsqueeze(0), (window.side, window.side))[0]
        large = large[:, above : above + rows.stop - rows.start, left : left + columns.stop - columns.start]
        total[window.inside] += face_weight.unsqueeze(-1).to(total) * large.movedim(0, -1).to(total)
        mask[window.inside] += face_weight.to(mask)
    changed = pasted(image.float(), total / mask.clamp(min=1.0).unsqueeze(-1), mask.unsqueeze(-1)).to(image)
    return torch.where(mask.unsqueeze(-1) > 0.0, changed, image), mask.clamp(max=1.0)


def pasted(image: Tensor, change: Tensor, mask: Tensor) -> Tensor:
    """``image`` + ``change``, clamped to 0..1; exactly ``image`` where the mask or the change is 0."""
    return torch.where((mask > 0.0) & (change != 0.0), (image + change).clamp(0.0, 1.0), image)
