"""Where an expert may paint: masks at the latent's size, as log scores."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def log_region(mask: Tensor | None, mode: str, label: str, x: Tensor) -> Tensor | None:
    """The log score [B, *S] of ``mask`` [R, H', W'] in 0..1 for the latent ``x`` [B, C, *S]; None where it changes nothing.

    compete: its logarithm, 0 is neutral and -inf bars. force: +inf where the mask is at least 0.5, -inf elsewhere.
    Masks are resized with antialiasing and repeated over the batch as the host repeats masks; for video one mask serves
    all frames, T masks the frames one by one.
    """
    if mask is None:
        return None
    region = mask.float().reshape(-1, 1, *mask.shape[-2:])
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
        region = region.repeat(batch, 1, 1)
    else:
        region = region.repeat(math.ceil(batch / region.shape[0]), 1, 1)[:batch].repeat_interleave(frames, dim=0)
    return region.reshape(batch, *x.shape[2:])
