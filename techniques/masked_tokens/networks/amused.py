"""aMUSEd's networks in one place, to hand them to what reads their files: host/ may not know them."""

from ....common.weights import check
from ....kernels.linear import linear
from .uvit import load_uvit
from .vq import load_vq

__all__ = ["check", "linear", "load_uvit", "load_vq"]
