"""Windows of a picture cut out at a network's scale, and what changed in them put back.

Shapes: N windows, S the side of a crop, H and W pixels of a picture, h and w those of a window that the picture has.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from kornia.geometry.transform import resize
from scipy.ndimage import distance_transform_cdt
from torch import Tensor

from .boxes import Window

Sides = tuple[bool, bool, bool, bool]  # left, right, above, below


def crop(picture: Tensor, place: Window, size: int) -> Tensor:
    """The window [1, 3, S, S] of a picture [H, W, 3]; what lies beyond is mirrored, or the edge where that is not enough."""
    found = picture[place.inside].movedim(-1, 0).unsqueeze(0).float()
    found = extend(found, place.beyond)
    return scaled(found, (size, size)).clamp(0.0, 1.0)


def extend(x: Tensor, beyond: tuple[int, int, int, int]) -> Tensor:
    """``x`` [N, C, H, W] with that much more left, right, above and below: mirrored, the rest its edge."""
    height, width = x.shape[-2:]
    mirrored = [min(n, most - 1) for n, most in zip(beyond, (width, width, height, height))]
    if any(mirrored):
        x = F.pad(x, mirrored, mode="reflect")
    rest = [n - m for n, m in zip(beyond, mirrored)]
    return F.pad(x, rest, mode="replicate") if any(rest) else x


def scaled(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[-2:] == size else resize(x, size, interpolation="bilinear", align_corners=False, antialias=True)


def edges(height: int, width: int, feather: int, sides: Sides = (True, True, True, True)) -> Tensor:
    """A weight [height, width] that falls to 1 / (feather + 1) at the ``sides`` left, right, above and below; 1 elsewhere."""

    def ramp(length: int, begin: bool, end: bool) -> Tensor:
        places = torch.arange(length, dtype=torch.float32)
        reach = min(feather, max((length - 1) // 2, 0))  # so that the middle is whole
        rising = torch.where(torch.tensor(begin), (places + 1) / (reach + 1), 1.0)
        falling = torch.where(torch.tensor(end), (length - places) / (reach + 1), 1.0)
        return torch.minimum(rising, falling).clamp(max=1.0)

    left, right, above, below = sides
    return ramp(height, above, below)[:, None] * ramp(width, left, right)


def ramp(mask: Tensor, feather: int) -> Tensor:
    """A mask [H, W], falling towards its edge over ``feather`` pixels inside it; the border of the picture is no edge."""
    mask = torch.nan_to_num(mask.float()).clamp(0.0, 1.0)
    inside = (mask > 0.0).cpu().numpy()
    if inside.all():  # no edge to be distant from
        return mask
    depth = torch.from_numpy(distance_transform_cdt(inside, metric="chessboard")).to(mask)
    return mask * depth.clamp(max=feather + 1) / (feather + 1)


def weight(place: Window, feather: int, limit: Tensor | None, framed: bool) -> Tensor:
    """How much of what was refined shows in the window, [h, w] of what the picture has of it: less towards the window's
    edges where it is ``framed``, save at the picture's border, and within ``limit`` [H, W]."""
    rows, columns = place.inside
    size = rows.stop - rows.start, columns.stop - columns.start
    sides = columns.start > 0, columns.stop < place.width, rows.start > 0, rows.stop < place.height
    found = edges(*size, feather, sides) if framed else torch.ones(size)
    return found if limit is None else found.to(limit) * limit[place.inside]


def paste(picture: Tensor, parts: Sequence[tuple[Window, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A picture [H, W, 3] with changes [3, S, S] added in windows by their weights, and the mask [H, W] of them all.

    Where windows overlap, they share: the order of the faces does not matter.
    """
    total, mask = picture.new_zeros(picture.shape, dtype=torch.float32), picture.new_zeros(picture.shape[:2]).float()
    for place, share, change in parts:
        left, _, above, _ = place.beyond
        rows, columns = place.inside
        large = scaled(change.unsqueeze(0), (place.side, place.side))[0]
        large = large[:, above : above + rows.stop - rows.start, left : left + columns.stop - columns.start]
        total[place.inside] += share.unsqueeze(-1).to(total) * large.movedim(0, -1).to(total)
        mask[place.inside] += share.to(mask)
    changed = pasted(picture.float(), total / mask.clamp(min=1.0).unsqueeze(-1), mask.unsqueeze(-1)).to(picture)
    return torch.where(mask.unsqueeze(-1) > 0.0, changed, picture), mask.clamp(max=1.0)


def pasted(picture: Tensor, change: Tensor, mask: Tensor) -> Tensor:
    """``picture`` where nothing changes, bit for bit, else the sum within 0..1."""
    return torch.where((mask > 0.0) & (change != 0.0), (picture + change).clamp(0.0, 1.0), picture)
