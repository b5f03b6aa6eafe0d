"""Saliency-aware noise blending in few passes of torch ops: what runs wherever Triton does not.

Three things make it cheaper than the definition: smoothing commutes with the channel mean, so one map per model is
smoothed instead of C; the softmax is never formed, its logarithm is k Λ - LSE(k Λ); and a hard mask selects
instead of multiplying, which also keeps every selected prediction bit for bit.
"""

import torch
from torch import Tensor

from .reference import smooth


def _log_saliency(cond: Tensor, reference: Tensor, sigma: Tensor, strength: float, blur: int) -> tuple[Tensor, Tensor]:
    """k Λ - LSE(k Λ) [B, *S] and the LSE [B, T] of one model, in float32; T is 1 for pictures."""
    difference = torch.sub(cond.float(), reference.float())
    saliency = torch.linalg.vector_norm(difference, ord=1, dim=1, dtype=torch.float32)  # [B, *S]
    saliency *= (strength / cond.shape[1] / sigma.float()).reshape(-1, *[1] * (saliency.ndim - 1))
    logits = smooth(saliency.reshape(-1, 1, *saliency.shape[-2:]), blur).view_as(saliency)
    partition = torch.logsumexp(logits, dim=(-2, -1), keepdim=True)
    return logits - partition, partition.reshape(len(cond), -1)


def _guide(cond: Tensor, uncond: Tensor, gain: float) -> Tensor:
    return cond if gain == 1.0 else torch.lerp(uncond, cond, gain)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``kernels.saliency_blend.saliency_blend``."""
    logs, partitions = [], []
    for c, u, k, b, r in zip(cond, uncond, strength, bias, region, strict=True):
        log, partition = _log_saliency(c, uncond[0] if shared else u, sigma, k, blur)
        if shared and u is not uncond[0]:  # the saliency has not looked at it: what is not finite must still show
            partition = partition + 0.0 * u.sum((1, -2, -1), dtype=torch.float32).reshape(len(u), -1)
        logs.append(log + b if r is None else log + b + r)
        partitions.append(partition.flatten())
    partition = torch.stack(partitions)

    if softness is not None:
        scores = torch.stack(logs)
        forced = torch.isposinf(scores)
        scores = torch.where(forced.any(0), torch.where(forced, 0.0, float("-inf")), scores)
        weights = torch.softmax(scores / softness, dim=0)
        out_cond = torch.zeros_like(cond[0], dtype=torch.float32)
        out_uncond = torch.zeros_like(out_cond)
        for c, u, g, w in zip(cond, uncond, gain, weights, strict=True):
            w = w.unsqueeze(1)  # [B, 1, *S]
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
        spread = wins.unsqueeze(1)  # [B, 1, *S]
        out_cond = torch.where(spread, _guide(cond[i], uncond[i], gain[i]), out_cond)
        out_uncond = torch.where(spread, uncond[i], out_uncond)
    return out_cond, out_uncond, owner, partition
