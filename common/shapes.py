"""Shapes as errors name them."""

from torch import Tensor


def size_of(x: Tensor) -> str:
    """The shape of ``x`` as text: 1x4x64x64."""
    return "x".join(map(str, x.shape))
