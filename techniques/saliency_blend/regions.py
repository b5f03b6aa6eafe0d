"""Where an expert may paint: masks at the latent's size, as log scores."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor


def log_region(mask: Tensor | None, mode: str, label: str, x: Tensor) -> Tensor | None:
    """The log score [B, *S] of ``mask`` [R, H', W'] in 0..1 for the latent ``x`` [B, C, *S]; None where it changes nothing.

    compete: its logarithm, 0 is neutral and -inf bars. force: +inf where the mask is at least 0.5, -inf elsewhere.
    Masks are resized with antialiasing and repeated over the batch as the host repeats masks; for video one mask serves
    all frames, T masks the frames one by one.
    """
    if mask is None:
        return None
    region = rearrange(mask.float(), "... h w -> (...) 1 h w")
    if not torch.isfinite(region).all():
        raise ValueError(f"the region of '{label}' holds values that are not finite; masks are 0 to 1")
    region = F.interpolate(region, size=x.shape[-2:], mode="bilinear", antialias=True, align_corners=False)
    region = region.squeeze(1).clamp(0.0, 1.0).to(x.device)
    if mode == "force":
        region = torch.where(region >= 0.5, float("inf"), float("-inf"))
    else:
        region = torch.where(region > 1.0 - 1e-6, 1.0, region)  # resizing rounds: what was 1 stays neutral
        if bool((region == 1.0).all()):
            return None
        region = region.log()
    batch, frames = x.shape[0], math.prod(x.shape[2:-2])
    if frames > 1 and region.shape[0] == frames:
        region = repeat(region, "t h w -> (b t) h w", b=batch)
    else:
        times = math.ceil(batch / region.shape[0])
        region = repeat(region, "b h w -> (times b) h w", times=times)[:batch]
        region = repeat(region, "b h w -> (b t) h w", t=frames)
    return region.reshape(batch, *x.shape[2:])


class LatentBox(NamedTuple):
    """A part of the latent: positions [top : top + height, left : left + width] of every frame."""

    top: int
    left: int
    height: int
    width: int

    def of(self, x: Tensor) -> Tensor:
        """The view [..., height, width] of ``x`` [..., H, W]."""
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def share_of(self, x: Tensor) -> float:
        """Of the positions of ``x`` [..., H, W]."""
        return self.height * self.width / (x.shape[-2] * x.shape[-1])


BOX_ALIGNMENT = 4  # latent positions; odd boxes cost a U-Net or a patch embedding padding at every level
MAX_CROP_AREA = 0.8  # share of the latent; a larger box saves less than cropping loses


def box_around(where: Tensor, margin: int) -> LatentBox | None:
    """The smallest aligned box that holds every true position of ``where`` [..., H, W] with ``margin`` around it.

    None where nothing is true or the box is most of the picture.
    """
    spans = []
    for n, found in zip(where.shape[-2:], (where.any(-1), where.any(-2)), strict=True):
        hits = found.reshape(-1, n).any(0).nonzero().flatten().tolist()
        if not hits:
            return None
        low = max(0, hits[0] - margin) // BOX_ALIGNMENT * BOX_ALIGNMENT
        high = min(n, -(-(hits[-1] + 1 + margin) // BOX_ALIGNMENT) * BOX_ALIGNMENT)
        spans.append((low, high - low))
    (top, height), (left, width) = spans
    if height * width > MAX_CROP_AREA * where.shape[-2] * where.shape[-1]:
        return None
    return LatentBox(top, left, height, width)


def barred_outside(region: Tensor | None, box: LatentBox, x: Tensor) -> Tensor:
    """The log score ``region`` for the latent ``x`` inside ``box``, -inf outside it: [B, *S]."""
    out = torch.full((x.shape[0], *x.shape[2:]), float("-inf"), device=x.device)
    box.of(out).copy_(torch.zeros((), device=x.device) if region is None else box.of(region))
    return out
