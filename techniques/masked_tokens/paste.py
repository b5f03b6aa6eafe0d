"""Pasting an inpainted region into the original image.

Pasting is needed because encoding to a codebook loses detail: decoding changes every pixel, even if no token changed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.shapes import size_of


def paste(original: Tensor, generated: Tensor, mask: Tensor, feather: int = 0) -> Tensor:
    """``generated`` where ``mask`` is 1, ``original`` bit for bit where it is 0.

    Images are [B, H, W, 3], the mask is [1 or B, H, W]. Inside the mask, both images are mixed within ``feather``
    pixels of the mask's edge. The border of the image does not count as an edge.
    """
    if generated.shape != original.shape:
        raise ValueError(
            f"a generated image of {size_of(generated)} does not fit an original of {size_of(original)};"
            " resize one to the other"
        )
    if mask.ndim != 3 or mask.shape[1:] != original.shape[1:3] or mask.shape[0] not in (1, original.shape[0]):
        raise ValueError(
            f"a mask of {size_of(mask)} does not fit an image of {size_of(original)}; resize it to the image"
        )
    if feather < 0:
        raise ValueError(f"feather {feather} is negative; use 0 for a hard edge")
    weight = _weight(mask.to(original).clamp(0.0, 1.0), feather).unsqueeze(-1)  # [1 or B, H, W, 1]
    mixed = torch.where(weight == 1.0, generated, torch.lerp(original, generated, weight))
    return torch.where(weight == 0.0, original, mixed)


def _weight(mask: Tensor, feather: int) -> Tensor:
    """``mask`` times a linear ramp: d / (feather + 1) at the d-th pixel inside the edge, at most 1."""
    outside = (mask == 0.0).to(mask).unsqueeze(1)
    depth = 1.0 - outside
    for _ in range(feather):
        outside = F.max_pool2d(outside, 3, stride=1, padding=1)
        depth = depth + (1.0 - outside)
    return mask * (depth.squeeze(1) / (feather + 1))
