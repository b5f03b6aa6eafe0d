"""Resizing of training images."""

import torch.nn.functional as F
from torch import Tensor


def fit_short_side(images: Tensor, size: int) -> Tensor:
    """``images`` [B, H, W, C] resized (bilinear) so that the shorter side is ``size``; unchanged if it already is."""
    height, width = images.shape[1:3]
    if min(height, width) == size:
        return images
    scale = size / min(height, width)
    shape = max(size, round(height * scale)), max(size, round(width * scale))
    resized = F.interpolate(images.movedim(-1, 1), shape, mode="bilinear", antialias=True, align_corners=False)
    return resized.clamp(0.0, 1.0).movedim(1, -1)
