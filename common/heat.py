"""Heat maps over images, from blue (low) to orange (high), which colour-blind readers can tell apart."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .sheets import model_colour

LOW, HIGH, OPACITY = model_colour(2), model_colour(1), 0.55


def over_image(image: Tensor, values: Tensor) -> Tensor:
    """``image`` [H, W, 3] in 0..1 under the map ``values`` [h, w]: the lowest value is blue, the highest one orange.

    A map of equal values is halfway between the colours.
    """
    low, high = float(values.min()), float(values.max())
    shares = torch.full_like(values, 0.5) if low == high else (values - low) / (high - low)
    shares = resized(shares.float(), image.shape[:2])[..., None]
    blue, orange = (torch.tensor(colour) / 255.0 for colour in (LOW, HIGH))
    return (1 - OPACITY) * image + OPACITY * torch.lerp(blue, orange, shares)


def resized(values: Tensor, size: tuple[int, ...]) -> Tensor:
    """``values`` [h, w] at ``size`` (height, width), by the nearest neighbour, so that no new value appears."""
    return F.interpolate(values[None, None], size, mode="nearest-exact")[0, 0]
