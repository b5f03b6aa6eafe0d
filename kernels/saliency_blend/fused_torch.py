"""Saliency-aware noise blending in few passes of torch ops: what runs wherever Triton does not.

Three things make it cheaper than the definition: smoothing commutes with the channel mean, so one map per model is
smoothed instead of C; the softmax is never formed, its logarithm is k Λ - LSE(k Λ); and a hard mask selects
instead of multiplying, which also keeps every selected prediction bit for bit.
"""

import torch
from torch import Tensor

from .reference import smooth


def _log_saliency(cond: Tensor, reference: Tensor, scale: Tensor, strength: float, blur: int) -> tuple[Tensor, Tensor]:
    """k Λ - LSE(k Λ) [B, H, W] and the LSE [B] of one model, in float32."""
    difference = torch.sub(cond.float(), reference.float())
    saliency = torch.linalg.vector_norm(difference, ord=1, dim=1, keepdim=True, dtype=torch.float32)  # [B, 1, H, W]
    saliency *= (scale * (strength / cond.shape[1])).reshape(-1, 1, 1, 1)
    logits = smooth(saliency, blur).squeeze(1)
    partition = torch.logsumexp(logits.flatten(1), dim=1)
    return logits - partition.reshape(-1, 1, 1), partition


def _guide(cond: Tensor, uncond: Tensor, gain: float) -> Tensor:
    return cond if gain == 1.0 else torch.lerp(uncond, cond, gain)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``kernels.saliency_blend.saliency_blend``."""
    logs, partitions = [], []
    for c, u, k, b in zip(cond, uncond, strength, bias, strict=True):
        log, partition = _log_saliency(c, uncond[0] if shared else u, scale, k, blur)
        if shared and u is not uncond[0]:  # the saliency has not looked at it: what is not finite must still show
            partition = partition + 0.0 * u.sum((1, 2, 3), dtype=torch.float32)
        logs.append(log + b)
        partitions.append(partition)
    partition = torch.stack(partitions)

    if softness is not None:
        scores = torch.stack(logs)
        forced = torch.isposinf(scores)
        scores = torch.where(forced.any(0), torch.where(forced, 0.0, float("-inf")), scores)
        weights = torch.softmax(scores / softness, dim=0)
        out_cond = torch.zeros_like(cond[0], dtype=torch.float32)
        out_uncond = torch.zeros_like(out_cond)
        for c, u, g, w in zip(cond, uncond, gain, weights, strict=True):
            w = w.unsqueeze(1)  # [B, 1, H, W]
            out_cond.addcmul_(_guide(c, u, g).float(), w)
            out_uncond.addcmul_(u.float(), w)
        return out_cond.to(cond[0].dtype), out_uncond.to(cond[0].dtype), weights, partition

    best = logs[0]
    owner = torch.zeros_like(best, dtype=torch.uint8)
    out_cond, out_uncond = _guide(cond[0], uncond[0], gain[0]), uncond[0]
    for i in range(1, len(cond)):
        wins = logs[i] > best  # strictly: the base, then chain order, keeps a tie
        best = torch.where(wins, logs[i], best)
        owner.masked_fill_(wins, i)
        spread = wins.unsqueeze(1)  # [B, 1, H, W]
        out_cond = torch.where(spread, _guide(cond[i], uncond[i], gain[i]), out_cond)
        out_uncond = torch.where(spread, uncond[i], out_uncond)
    return out_cond, out_uncond, owner, partition
