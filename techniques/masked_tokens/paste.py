"""Putting what was painted under a mask back into the picture it belongs to.

Decoding tokens repaints the whole picture, also where no token changed: the codebook is coarser than pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def paste(original: Tensor, painted: Tensor, mask: Tensor, feather: int = 0) -> Tensor:
    """``painted`` where ``mask`` is 1, ``original`` bit for bit where it is 0.

    Pictures are [B, H, W, 3], the mask [1 or B, H, W]. Inside the mask, within ``feather`` pixels of its edge, the two
    are mixed; the border of the picture is no edge.
    """
    if painted.shape != original.shape:
        raise ValueError(
            f"a painted picture of {tuple(painted.shape)} does not fit an original of {tuple(original.shape)};"
            " resize one to the other"
        )
    if mask.ndim != 3 or mask.shape[1:] != original.shape[1:3] or mask.shape[0] not in (1, original.shape[0]):
        raise ValueError(
            f"a mask of {tuple(mask.shape)} does not fit a picture of {tuple(original.shape)}; resize it to the picture"
        )
    if feather < 0:
        raise ValueError(f"feather {feather} is negative; use 0 for a hard edge")
    weight = _weight(mask.to(original).clamp(0.0, 1.0), feather).unsqueeze(-1)  # [1 or B, H, W, 1]
    mixed = torch.where(weight == 1.0, painted, torch.lerp(original, painted, weight))
    return torch.where(weight == 0.0, original, mixed)


def _weight(mask: Tensor, feather: int) -> Tensor:
    """``mask`` times a linear ramp: d / (feather + 1) at the d-th pixel from the edge, 1 from there on."""
    outside = (mask == 0.0).to(mask).unsqueeze(1)
    depth = 1.0 - outside
    for _ in range(feather):
        outside = F.max_pool2d(outside, 3, stride=1, padding=1)
        depth = depth + (1.0 - outside)
    return mask * (depth.squeeze(1) / (feather + 1))
