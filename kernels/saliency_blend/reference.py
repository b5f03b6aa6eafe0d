"""Saliency-aware noise blending, written as the paper says it (MagicFusion, arXiv 2303.13126, section 3).

N models, B samples, C channels, H x W positions; every frame of a video is a sample.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
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


def log_saliency(cond: Tensor, reference: Tensor, sigma: Tensor, strength: float, blur: int) -> Tensor:
    """ln softmax(k Λ) of one model: [B, C, H, W] x 2, sigma [B] -> [B, H, W]."""
    saliency = (cond - reference).abs() / sigma.reshape(-1, 1, 1, 1)
    saliency = smooth(saliency, blur).mean(1)
    return torch.log_softmax(strength * saliency.flatten(1), dim=1).view_as(saliency)


def fold_frames(x: Tensor) -> Tensor:
    """[B, C, H, W] as it is; [B, C, T, H, W] -> [B T, C, H, W]."""
    return x if x.ndim == 4 else rearrange(x, "b c t h w -> (b t) c h w")


def unfold_frames(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``fold_frames`` for a tensor shaped as ``like``."""
    return x if like.ndim == 4 else rearrange(x, "(b t) c h w -> b c t h w", b=like.shape[0])


def saliency_blend(
    cond: list[Tensor],
    uncond: list[Tensor],
    sigma: Tensor,
    strength: list[float],
    bias: list[float],
    region: list[Tensor | None],
    gain: list[float],
    *,
    blur: int,
    shared: bool,
    softness: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kernels.saliency_blend.saliency_blend``; here ``weights`` [N, B, *S] are always formed."""
    like = cond[0]
    positions = (like.shape[0], *like.shape[2:])
    conds, unconds = (torch.stack([fold_frames(p).float() for p in side]) for side in (cond, uncond))  # [N, B, C, H, W]
    sigma = sigma.repeat_interleave(conds.shape[1] // like.shape[0])
    scores = torch.stack(
        [
            log_saliency(c, unconds[0] if shared else u, sigma, k, blur) + b
            for c, u, k, b in zip(conds, unconds, strength, bias, strict=True)
        ]
    )
    forced = torch.zeros_like(scores, dtype=torch.bool)
    for i, r in enumerate(region):
        if r is not None:
            r = r.expand(positions).reshape(scores.shape[1:])
            forced[i] = torch.isposinf(r)
            scores[i] += r
    exclusive = torch.where(forced, 0.0, float("-inf"))
    scores = torch.where(forced.any(0), exclusive, scores)
    if softness is None:
        winner = scores.argmax(0, keepdim=True)  # the first of equals: the base, then chain order
        weights = torch.zeros_like(scores).scatter_(0, winner, 1.0)
    else:
        weights = torch.softmax(scores / softness, dim=0)
    guided = unconds + torch.tensor(gain, device=conds.device).reshape(-1, 1, 1, 1, 1) * (conds - unconds)
    spread = weights.unsqueeze(2)  # [N, B, 1, H, W]
    out_cond, out_uncond = (unfold_frames((p * spread).sum(0).to(like.dtype), like) for p in (guided, unconds))
    return out_cond, out_uncond, weights.reshape(-1, *positions)
