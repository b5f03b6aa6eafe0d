"""Saliency-aware noise blending, written as the paper says it (MagicFusion, arXiv 2303.13126, section 3).

N models, B samples, C channels, H x W positions; video latents are folded into samples by the caller.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def smooth(saliency: Tensor, blur: int) -> Tensor:
    """Average ``saliency`` [B, C, H, W] over ``blur`` x ``blur`` positions, zeros beyond the border, size kept.

    An even box has no centre: as in the authors' code, the map that is one position short is stretched back.
    """
    if blur <= 1:
        return saliency
    pad = (blur - 1) // 2
    size = saliency.shape[-2:]
    box = [min(blur, n + 2 * pad) for n in size]  # a picture smaller than the box is averaged whole
    pooled = F.avg_pool2d(saliency, box, stride=1, padding=pad)
    return F.interpolate(pooled, size=size, mode="bilinear", align_corners=False)


def scores(cond: Tensor, reference: Tensor, scale: Tensor, strength: float, bias: Tensor, blur: int) -> Tensor:
    """ln softmax(k Λ) + bias of one model: [B, C, H, W] x 2, scale [B], bias [B or 1, H, W] -> [B, H, W]."""
    saliency = (cond - reference).abs() * scale.reshape(-1, 1, 1, 1)
    saliency = smooth(saliency, blur).mean(1)
    return torch.log_softmax(strength * saliency.flatten(1), dim=1).view_as(saliency) + bias


def saliency_blend(
    cond: list[Tensor],
    uncond: list[Tensor],
    scale: Tensor,
    strength: list[float],
    bias: list[Tensor],
    gain: list[float],
    *,
    blur: int,
    shared: bool,
    softness: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kernels.saliency_blend.saliency_blend``; here ``weights`` [N, B, H, W] are always formed."""
    dtype = cond[0].dtype
    cond, uncond = torch.stack(cond).float(), torch.stack(uncond).float()  # [N, B, C, H, W]
    all_scores = torch.stack(
        [
            scores(c, uncond[0] if shared else u, scale, k, b, blur)
            for c, u, k, b in zip(cond, uncond, strength, bias, strict=True)
        ]
    )
    forced = torch.stack([torch.isposinf(b).expand_as(all_scores[0]) for b in bias])
    exclusive = torch.where(forced, 0.0, float("-inf"))
    all_scores = torch.where(forced.any(0), exclusive, all_scores)
    if softness is None:
        winner = all_scores.argmax(0, keepdim=True)  # the first of equals: the base, then chain order
        weights = torch.zeros_like(all_scores).scatter_(0, winner, 1.0)
    else:
        weights = torch.softmax(all_scores / softness, dim=0)
    guided = uncond + torch.tensor(gain, device=cond.device).reshape(-1, 1, 1, 1, 1) * (cond - uncond)
    spread = weights.unsqueeze(2)  # [N, B, 1, H, W]
    return (guided * spread).sum(0).to(dtype), (uncond * spread).sum(0).to(dtype), weights
