"""Regions of experts: the logarithms of their masks at the latent's size, and boxes around them."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ...common.host_copy import HostCopy


def log_region(mask: Tensor | None, mode: str, label: str, x: Tensor, frame_ratio: int = 1) -> Tensor | None:
    """ln(region) [B, *S] of the expert ``label`` for the latent ``x`` [B, C, *S], on the mask's device.

    It is None if the region has no effect.

    ``mask`` [R, H', W'] has values in 0..1. ``mode`` compete: the logarithm of the mask. It has no effect where the
    mask is 1, and is -inf, which excludes the expert, where the mask is 0. ``mode`` force: +inf where the mask is at
    least 0.5, -inf elsewhere. Masks are resized with antialiasing.

    R is 1 for one mask everywhere, or B for one mask per sample. If B is a multiple of R, the masks repeat, as after
    Repeat Latent Batch. For a video of T latent frames it may also be T for one
    mask per latent frame, or one mask per frame of the decoded video, which has (T - 1) ``frame_ratio`` + 1 frames. The
    masks of the frames that are decoded from one latent frame are averaged. B times as many masks are masks per frame
    of each sample.

    Errors (ValueError): a mask that is not finite; any other number of masks.
    """
    if mask is None:
        return None
    region = rearrange(mask.float(), "... h w -> (...) 1 h w")
    if not torch.isfinite(region).all():
        raise ValueError(
            f"the region of '{label}' is not finite (NaN or infinite); connect a mask with values from 0 to 1"
        )
    region = F.interpolate(region, size=x.shape[-2:], mode="bilinear", antialias=True, align_corners=False)
    region = _per_frame(region.squeeze(1).clamp(0.0, 1.0), label, x, frame_ratio)
    if mode == "force":
        return torch.where(region >= 0.5, float("inf"), float("-inf"))
    region = torch.where(region > 1.0 - 1e-6, 1.0, region)  # resizing rounds, and a 1 must stay exactly 1
    return None if bool((region == 1.0).all()) else region.log()


def _per_frame(region: Tensor, label: str, x: Tensor, frame_ratio: int) -> Tensor:
    """``region`` [R, H, W] as [B, *S] for the latent ``x`` [B, C, *S]; see ``log_region``."""
    count, batch, frames = len(region), len(x), math.prod(x.shape[2:-2])
    decoded = (frames - 1) * frame_ratio + 1
    if frames > 1 and count == frames:
        region = repeat(region, "t h w -> b t h w", b=batch)
    elif count in (1, batch):
        region = repeat(region.expand(batch, -1, -1), "b h w -> b t h w", t=frames)
    elif frames > 1 and count in (decoded, batch * decoded, batch * frames):
        length = frames if count not in (decoded, batch * decoded) else decoded
        region = region.unflatten(0, (-1, length))
        if length == decoded:
            later = region[:, 1:].unflatten(1, (frames - 1, -1)).mean(2)
            region = torch.cat([region[:, :1], later], dim=1)
        region = region.expand(batch, -1, -1, -1)
    elif count and batch % count == 0:  # as ComfyUI repeats the noise mask of a latent
        region = repeat(region, "r h w -> (k r) t h w", k=batch // count, t=frames)
    else:
        kind = "image" if frames == 1 else "video"
        expected = "1 mask" if batch == 1 else f"1 mask for all {batch} {kind}s, or {batch} masks (one per {kind})"
        if frames > 1:
            expected += f", or {frames} (one per latent frame), or {decoded} (one per frame)"
        raise ValueError(
            f"expected {expected} as the region of '{label}', got {count} masks; connect the masks of this batch, or a"
            " single mask"
        )
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
        """The share of the positions of ``x`` [..., H, W] that lie in the box."""
        return self.height * self.width / (x.shape[-2] * x.shape[-1])


BOX_ALIGNMENT = 4  # latent positions; U-Nets and patch embeddings would pad boxes of odd sizes
MAX_CROP_AREA = 0.8  # share of the latent; an expert whose box would be larger is not cropped


class Extent:
    """The rows and columns that contain a true position of ``where`` [..., H, W].

    They are copied to the host without waiting for the GPU.
    """

    def __init__(self, where: Tensor) -> None:
        rows, columns = (where.any(axis).flatten(0, -2).any(0) for axis in (-1, -2))
        self._size = len(rows), len(columns)
        self._found = HostCopy(torch.cat([rows, columns]))

    def box(self, margin: int) -> LatentBox | None:
        """The smallest aligned box around all true positions, with a ``margin`` in positions.

        None if no position is true, or if the box is larger than MAX_CROP_AREA of the image.
        """
        found, (height, width) = self._found.tolist(), self._size
        spans = []
        for n, part in ((height, found[:height]), (width, found[height:])):
            hits = [i for i, hit in enumerate(part) if hit]
            if not hits:
                return None
            low = max(0, hits[0] - margin) // BOX_ALIGNMENT * BOX_ALIGNMENT
            high = min(n, -(-(hits[-1] + 1 + margin) // BOX_ALIGNMENT) * BOX_ALIGNMENT)
            spans.append((low, high - low))
        box = LatentBox(spans[0][0], spans[1][0], spans[0][1], spans[1][1])
        return None if box.height * box.width > MAX_CROP_AREA * height * width else box


def barred_outside(region: Tensor | None, box: LatentBox, x: Tensor) -> Tensor:
    """``region`` [B, *S] inside ``box``, 0 if None, and -inf outside; for the latent ``x`` [B, C, *S]."""
    out = torch.full((x.shape[0], *x.shape[2:]), float("-inf"), device=x.device)
    box.of(out).copy_(torch.zeros((), device=x.device) if region is None else box.of(region))
    return out
