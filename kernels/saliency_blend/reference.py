"""The definition of saliency-aware noise blending (MagicFusion, arXiv 2303.13126, section 3).

N models, B samples, C channels, H x W positions; every frame of a video is a sample.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# twice the distance of a threshold below the smallest lead, as a fraction of the range of leads, see rank_threshold()
BELOW = 1e-4
ROUNDING = 1e-6  # bound on the rounding error of k Λ in float32, relative to the largest value of a map


def smooth(saliency: Tensor, blur: int) -> Tensor:
    """Average ``saliency`` [B, C, H, W] over ``blur`` x ``blur`` positions at the same size, with zeros as padding.

    An image of one row or column is averaged only along the other axis.

    A box with an even side has no centre, so its map is one position shorter. As in the authors' code, the map is
    stretched back to the full size.
    """
    if blur <= 1:
        return saliency
    size = saliency.shape[-2:]
    pads = [(blur - 1) // 2 if n > 1 else 0 for n in size]
    # an image smaller than the box is averaged as a whole
    box = [min(blur, n + 2 * pad) for n, pad in zip(size, pads, strict=True)]
    pooled = F.avg_pool2d(saliency, box, stride=1, padding=pads)
    return F.interpolate(pooled, size=size, mode="bilinear", align_corners=False)


def scaled_saliency(cond: Tensor, reference: Tensor, sigma: Tensor, strength: float, blur: int) -> Tensor:
    """k Λ [B, H, W] of one model, from ``cond`` and ``reference`` [B, C, H, W] and ``sigma`` [B]; ``strength`` is k."""
    saliency = (cond - reference).abs() / sigma.reshape(-1, 1, 1, 1)
    return strength * smooth(saliency, blur).mean(1)


def fold_frames(x: Tensor) -> Tensor:
    """[B, C, T, H, W] as [B T, C, H, W]; [B, C, H, W] is returned unchanged."""
    return x if x.ndim == 4 else rearrange(x, "b c t h w -> (b t) c h w")


def unfold_frames(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``fold_frames`` for a tensor shaped as ``like``."""
    return x if like.ndim == 4 else rearrange(x, "(b t) c h w -> b c t h w", b=like.shape[0])


def spread(scores: Tensor) -> Tensor:
    """The unit of ``bias``, ln(region) and ``softness``: the standard deviation of a model's lead over the positions.

    ``scores``: [N, B, H, W], see ``saliency_blend``. Returns [N, B]. The lead is scores - scores[0], so that the
    base's spread is 0.
    """
    return standard_deviation((scores - scores[:1]).flatten(2).var(dim=2, correction=0))


def standard_deviation(variance: Tensor) -> Tensor:
    """The square root of ``variance``, with a gradient of 0 instead of infinity at 0."""
    zero = variance == 0.0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, variance).sqrt())


def positions_by_rank(lead: Tensor, quota: int) -> Tensor:
    """A bool map [H, W] of the ``quota`` positions with the largest ``lead`` [H, W]; leads of -inf are never chosen.

    Of equal leads, the first ones in memory are taken.
    """
    order = sorted((-value, n) for n, value in enumerate(lead.flatten().tolist()) if value > float("-inf"))
    chosen = torch.zeros(lead.numel(), dtype=torch.bool)
    chosen[[n for _, n in order[:quota]]] = True
    return chosen.view_as(lead)


def rank_threshold(lead: Tensor, quota: int) -> float:
    """The threshold above which ``quota`` values of ``lead`` lie, halfway to the next smaller value.

    It is inf if ``quota`` is 0. Values of -inf are ignored. If the quota includes all other values, the
    threshold is a little below the smallest.
    """
    order = sorted((value for value in lead.flatten().tolist() if value > float("-inf")), reverse=True)
    if quota == 0 or not order:
        return float("inf")
    if quota >= len(order):
        order.append(order[-1] - BELOW * (order[0] - order[-1]))
        quota = len(order) - 1
    return 0.5 * (order[quota - 1] + order[quota])


def saliency_blend(
    cond: list[Tensor],
    uncond: list[Tensor],
    sigma: Tensor,
    strength: list[float],
    bias: list[float],
    region: list[Tensor | None],
    gain: list[float],
    *,
    quota: Sequence[Tensor | int | None] | None = None,
    memory: Sequence[Tensor | None] | None = None,
    momentum: float = 0.0,
    blur: int,
    shared: bool,
    softness: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``kernels.saliency_blend.saliency_blend``. Here ``weights`` are [N, B, *S] for a hard mask, too.

    With predictions in float64, everything is computed and returned in float64.
    """
    like = cond[0]
    dtype = torch.promote_types(like.dtype, torch.float32)
    positions = (like.shape[0], *like.shape[2:])
    conds, unconds = (
        torch.stack([fold_frames(p).to(dtype) for p in side]) for side in (cond, uncond)
    )  # [N, B, C, H, W]
    samples = conds.shape[1]
    sigma = sigma.to(dtype).repeat_interleave(samples // like.shape[0])
    logits = torch.stack(
        [
            scaled_saliency(c, unconds[0] if shared else u, sigma, k, blur)
            for c, u, k in zip(conds, unconds, strength, strict=True)
        ]
    )
    for i, earlier in enumerate(memory or ()):
        if earlier is not None:
            logits[i] = momentum * earlier.reshape(logits[i].shape) + (1.0 - momentum) * logits[i]
    exact = logits.double()
    partition = torch.logsumexp(exact.flatten(2), dim=2) - math.log(exact[0, 0].numel())
    scores = (exact - partition[..., None, None]).to(dtype)
    unit = spread(scores)
    # a spread within the rounding error of k Λ counts as 0: both maps are then constant, and no model leads anywhere
    largest = logits.flatten(2).amax(2)
    unit = torch.where(unit <= ROUNDING * torch.maximum(largest, largest[:1]), 0.0, unit)
    scores = torch.where(unit[..., None, None] == 0.0, scores[:1], scores)
    regions = [
        scores.new_zeros(scores.shape[1:])
        if r is None
        else r.to(scores.device, dtype).expand(positions).reshape(scores.shape[1:])
        for r in region
    ]
    forced = torch.zeros_like(scores, dtype=torch.bool)
    taken = torch.zeros_like(scores[0], dtype=torch.bool)
    out = scores.clone()
    for i, r in enumerate(regions):
        added = torch.where(r.isinf(), r, r * unit[i].reshape(-1, 1, 1))
        if quota is None or (q := quota[i]) is None:
            forced[i] = torch.isposinf(r)
            out[i] = scores[i] + bias[i] * unit[i].reshape(-1, 1, 1) + added
            continue
        counts = [int(c) for c in torch.as_tensor(q).expand(samples)]
        lead = scores[i] - scores[0] + added
        if softness is None:
            lead = torch.where(taken, float("-inf"), lead)
            forced[i] = torch.stack([positions_by_rank(x, n) for x, n in zip(lead, counts, strict=True)])
            taken = taken | forced[i]
            out[i] = float("-inf")
        else:
            threshold = torch.tensor([rank_threshold(x, n) for x, n in zip(lead, counts, strict=True)])
            out[i] = scores[i] + added - threshold.reshape(-1, 1, 1)
    exclusive = torch.where(forced, 0.0, float("-inf"))
    out = torch.where(forced.any(0), exclusive, out)
    if softness is None:
        # of equal scores the first wins: the base, then the experts in the order of the chain
        winner = out.argmax(0, keepdim=True)
        weights = torch.zeros_like(out).scatter_(0, winner, 1.0)
    else:
        scale = softness * mean_spread(unit).reshape(-1, 1, 1)
        weights = torch.softmax(torch.where(forced.any(0), exclusive, out / scale), dim=0)
    guided = unconds + torch.tensor(gain, device=conds.device, dtype=dtype).reshape(-1, 1, 1, 1, 1) * (conds - unconds)
    each = weights.unsqueeze(2)  # [N, B, 1, H, W]
    out_cond, out_uncond = (unfold_frames((p * each).sum(0).to(like.dtype), like) for p in (guided, unconds))
    shape = (-1, *positions)
    return out_cond, out_uncond, weights.reshape(shape), partition.to(dtype), logits.reshape(shape), unit


def mean_spread(unit: Tensor) -> Tensor:
    """The unit [B] of ``softness``: the mean spread of the experts, or 1 where this mean is 0.

    All experts share this unit, so that small values of ``softness`` approach the hard mask.
    """
    mean = unit[1:].mean(0) if len(unit) > 1 else unit[0]
    return torch.where(mean > 0.0, mean, 1.0)
