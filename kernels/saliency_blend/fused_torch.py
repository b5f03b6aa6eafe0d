"""Saliency-aware noise blending in few passes of torch operations, for all devices without Triton.

This implementation is cheaper than the definition in ``reference.py`` for these reasons:
- Smoothing commutes with the channel mean, so that one map per model is smoothed instead of one per channel.
- The maps of all models are stacked in one tensor, so that one operation processes any number of models.
- A hard mask selects instead of multiplying, which also keeps every selected prediction bit for bit.
- On a CPU, the predictions are processed in pieces that stay in the CPU cache from one operation to the next.

The bits of a map must not depend on its position in the stack, so that an expert has the same scores in any order of
the chain. The operations on the stack are therefore those that round each element once (add, multiply) or reduce each
map separately. A matmul, lerp or addcmul is not used there, because it may round differently in the body of a
vectorised loop and in its tail.
"""

from collections.abc import Iterator, Sequence
from types import EllipsisType
from typing import TypeAlias

import torch
from torch import Tensor

from .quota import assign_quotas
from .reference import ROUNDING, smooth

# Number of elements of a piece, 4 MiB in float32. On one core, the blend of two models at 4x16x256x256 takes 20 ms, and
# the blend of four models 66 ms. Without pieces these times are 24 and 130 ms. With pieces of a quarter of the size
# they are 20 and 60 ms, but torch then waits for threads four times as often, and each wait is long on a busy machine.
PIECE = 1 << 20
SMALL_MAP = 1 << 14  # positions; torch reduces a map of at most this size in one thread
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer dtypes by bytes per element
Piece: TypeAlias = tuple[slice, EllipsisType, slice, slice]


def _pieces(prediction: Tensor) -> Iterator[Piece | None]:
    """Indices of pieces of about ``PIECE`` elements; each piece is a block of rows of one sample.

    The indices fit tensors [B, C, *S] and [B, *S]. Yields only None if the tensors are processed whole.
    """
    samples, height = prediction.shape[0], prediction.shape[-2]
    if prediction.device.type != "cpu" or prediction.numel() <= PIECE:
        yield None
        return
    rows = max(1, PIECE * samples * height // prediction.numel())
    for sample in range(samples):
        for row in range(0, height, rows):
            yield slice(sample, sample + 1), ..., slice(row, row + rows), slice(None)


def _cut(piece: Piece | None, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors if piece is None else [t[piece] for t in tensors]


def _window(x: Tensor, count: int, axis: int) -> Tensor:
    """The sums of ``count`` neighbours along ``axis``, which becomes ``count`` - 1 shorter.

    Computed by doubling the window.
    """
    if count == 1:
        return x
    half = count // 2
    length = x.shape[axis] - count + 1
    halves = _window(x, half, axis)
    out = halves.narrow(axis, 0, length) + halves.narrow(axis, half, length)
    return out + x.narrow(axis, count - 1, length) if count % 2 else out


def _shares(n: int, device: torch.device) -> Tensor:
    """The weight of the earlier of two box sums at each of ``n`` stretched positions, from 0 to 1."""
    shares = torch.linspace(0.5 / n, 1.0 - 0.5 / n, n, device=device)
    shares[0], shares[-1] = 0.0, 1.0
    return shares


def _stretch(x: Tensor, axis: int, shares: Tensor) -> Tensor:
    """Stretch n + 1 box sums, which lie between the positions, to n positions by linear interpolation along ``axis``.

    The weights from ``shares`` are 0 for the first and the last sum. The result is therefore torch's bilinear
    interpolation of the other n - 1 sums.
    """
    n = len(shares)
    later = x.narrow(axis, 1, n)
    out = x.narrow(axis, 0, n) - later
    out *= shares if axis == -1 else shares.unsqueeze(1)
    out += later
    return out


def _blur(padded: Tensor, blur: int) -> Tensor:
    """The sums over ``blur`` x ``blur`` boxes of maps [..., H, W] with ``blur`` // 2 zeros on every side."""
    out = _window(_window(padded, blur, -2), blur, -1)
    if blur % 2:
        return out
    height, width = (n - 1 for n in out.shape[-2:])
    across = _shares(width, out.device)
    down = across if height == width else _shares(height, out.device)
    return _stretch(_stretch(out, -1, across), -2, down)


def _logits(cond: list[Tensor], against: list[Tensor], sigma: Tensor, strength: list[float], blur: int) -> Tensor:
    """k Λ of all models [N, B, *S], in float32."""
    like, models = cond[0], len(cond)
    height, width = like.shape[-2:]
    quick = blur > 1 and min(height, width) > 1  # smooth() handles images of one row or column
    pad = blur // 2 if quick else 0
    maps = (models, len(like), *like.shape[2:-2], height + 2 * pad, width + 2 * pad)
    padded = torch.zeros(maps, device=like.device, dtype=torch.float32)
    inner = padded[..., pad : pad + height, pad : pad + width]
    mean = 1.0 / (like.shape[1] * (blur * blur if quick else 1))
    for i, (c, u, k) in enumerate(zip(cond, against, strength, strict=True)):
        for piece in _pieces(like):
            part, c_part, u_part = _cut(piece, (inner[i], c, u))
            difference = c_part.float() - u_part
            part.add_(difference.abs_().sum(1), alpha=k * mean)
    out = _blur(padded, blur) if quick else smooth(padded.flatten(0, -3).unsqueeze(1), blur).view_as(padded)
    out /= sigma.float().reshape(-1, *[1] * (like.ndim - 2))
    return out


def _known(condition: Tensor) -> bool:
    """Whether ``condition`` holds everywhere, if its values can be read without waiting for a device; otherwise False.

    The caller saves operations on whole maps if the answer is True. The result must not depend on the answer.
    """
    return condition.device.type == "cpu" and not torch.compiler.is_compiling() and bool(condition.all())


def _mean(maps: Tensor) -> Tensor:
    """The means [..., 1, 1] of ``maps`` [..., H, W].

    Their bits must not depend on the batch. torch may split the sum of a large map among threads if there is only one
    map, so that large maps are summed row by row.
    """
    positions = maps.shape[-2] * maps.shape[-1]
    if positions <= SMALL_MAP:
        return maps.mean((-2, -1), keepdim=True)
    return (maps.sum(-1).sum(-1) / positions)[..., None, None]


def log_mean_exp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """ln of the mean of exp(``logits``) over the positions, exact to the rounding of ``logits``; and the largest value.

    ``logits`` [N, B, *S] -> two tensors [N, B, (T,) 1, 1].

    If all ``logits`` are nearly equal, the mean of exp is near 1, and float32 rounds away the small difference between
    this mean and 1. The scores depend on this difference, so the logarithm is then computed by expm1 and log1p.
    """
    top = logits.detach().amax((-2, -1), keepdim=True)
    below = logits - top
    excess = _mean(below.expm1())  # the mean of exp, minus 1
    near_1 = excess >= -0.5
    if _known(near_1):
        return top + excess.log1p(), top
    return top + torch.where(near_1, excess.log1p(), _mean(below.exp()).log()), top


def spread_of(logs: Tensor, top: Tensor) -> tuple[Tensor, bool]:
    """The spread [N, B T] over the positions of each frame; and whether it is known that no expert's spread is 0.

    ``logs``: the scores [N, B, *S]. ``top``: the largest k Λ [N, B, (T,) 1, 1]. A spread within the rounding error of
    k Λ is 0, as for constant maps; so is the base's. As in ``_mean``, large maps are reduced row by row first.
    """
    positions = logs.shape[-2] * logs.shape[-1]
    lead = logs[1:] - logs[0]
    lead = lead - _mean(lead)
    if positions <= SMALL_MAP:
        length = torch.linalg.vector_norm(lead, dim=(-2, -1), keepdim=True)
    else:
        length = torch.linalg.vector_norm(torch.linalg.vector_norm(lead, dim=-1), dim=-1)[..., None, None]
    spread = length / positions**0.5
    limit = ROUNDING * torch.maximum(top[1:], top[0])
    if not (known := _known(spread > limit)):
        spread = torch.where(spread <= limit, 0.0, spread)
    return torch.constant_pad_nd(spread.flatten(1), (0, 0, 1, 0)), known


def scores_of(logits: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """The score [B, *S] of each model, and the partition and the spread [N, B T], from k Λ ``logits`` [N, B, *S]."""
    partition, top = log_mean_exp(logits)
    logs = logits - partition
    spread, contested = spread_of(logs, top)
    scores = list(logs.unbind(0))
    if not contested:
        # where the spread is 0, the expert gets the base's scores, so that rounding errors do not decide
        above_0 = spread.view(*logs.shape[:-2], 1, 1)[1:] > 0.0
        scores[1:] = [torch.where(c, one, scores[0]) for c, one in zip(above_0, scores[1:], strict=True)]
    return scores, partition.flatten(1), spread


def _mean_spread(spread: Tensor) -> Tensor:
    """The mean spread [B T] of the experts, which is the unit of softness; 1 where the mean is 0."""
    mean = spread[1:].sum(0) / max(1, len(spread) - 1)
    return torch.where(mean > 0.0, mean, 1.0)


def _guide(cond: Sequence[Tensor], uncond: Sequence[Tensor], gain: list[float]) -> list[Tensor]:
    return [c if g == 1.0 else torch.lerp(u, c, g) for c, u, g in zip(cond, uncond, gain, strict=True)]


def _select(models: list[Tensor], wins: list[Tensor]) -> Tensor:
    """At each position, the prediction of the last expert whose ``wins`` [B, 1, *S] is true, else that of the base.

    ``models``: N predictions [B, C, *S], the base first; ``wins``: one map for each of the N - 1 experts.
    """
    out = models[0]
    for model, won in zip(models[1:], wins, strict=True):
        out = torch.where(won, model, out)
    return out


def _overlay(out: Tensor, models: Sequence[Tensor], wins: Sequence[Tensor]) -> None:
    """Write the result of ``_select`` to ``out``, for predictions that are viewed as integers.

    The integer operations process whole vectors, while torch.where processes single elements. Selecting from two
    predictions of 4x4x128x128 takes 51 us instead of 117.
    """
    torch.bitwise_xor(models[0], models[1], out=out)
    out *= wins[0]
    out ^= models[0]
    for model, won in zip(models[2:], wins[1:], strict=True):
        change = out ^ model
        change *= won
        out ^= change


def _compete(scores: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The index of the winner at every position, and for each expert the positions where it beats all models before it.

    Returns uint8 [B, *S], and a list of bool [B, 1, *S] with one mask per expert.
    """
    best, wins = scores[0], []
    owner = None
    for i in range(1, len(scores)):
        best = best if i == 1 else torch.maximum(best, scores[i - 1])
        won = scores[i] > best  # > and not >=: a tie goes to the base, then to the earlier expert
        owner = won.view(torch.uint8) if owner is None else torch.maximum(owner, won.view(torch.uint8) * i)
        wins.append(won.unsqueeze(1))
    return torch.zeros_like(best, dtype=torch.uint8) if owner is None else owner, wins


def _hard(
    cond: list[Tensor], uncond: list[Tensor], gain: list[float], scores: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    like = cond[0]
    owner, wins = _compete(scores)
    differentiable = torch.is_grad_enabled() and any(p.requires_grad for p in (*cond, *uncond))
    if like.device.type != "cpu" or differentiable or len(cond) == 1:
        return _select(_guide(cond, uncond, gain), wins), _select(uncond, wins), owner
    bits = BITS[like.element_size()]
    out_cond, out_uncond = (torch.empty(like.shape, dtype=bits) for _ in range(2))
    for piece in _pieces(like):
        c, u, won, out = (_cut(piece, ts) for ts in (cond, uncond, wins, (out_cond, out_uncond)))
        _overlay(out[0], [t.view(bits) for t in _guide(c, u, gain)], won)
        _overlay(out[1], [t.view(bits) for t in u], won)
    return out_cond.view(like.dtype), out_uncond.view(like.dtype), owner


def _weigh(models: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    out = models[0].float() * weights[0]
    for model, weight in zip(models[1:], weights[1:], strict=True):
        out.addcmul_(model.float(), weight)
    return out


def _soft(cond: list[Tensor], uncond: list[Tensor], gain: list[float], scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    like = cond[0]
    weights = torch.softmax(scores, dim=0)
    shares = weights.unsqueeze(2).unbind(0)  # [B, 1, *S] of each model
    out_cond, out_uncond = (torch.empty(like.shape, dtype=like.dtype, device=like.device) for _ in range(2))
    for piece in _pieces(like):
        c, u, w, out = (_cut(piece, ts) for ts in (cond, uncond, shares, (out_cond, out_uncond)))
        out[0].copy_(_weigh(_guide(c, u, gain), w))
        out[1].copy_(_weigh(u, w))
    return out_cond, out_uncond, weights


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
    """See ``kernels.saliency_blend.saliency_blend``."""
    models = len(cond)
    logits = _logits(cond, [uncond[0]] * models if shared else uncond, sigma, strength, blur)
    for i, earlier in enumerate(memory or ()):
        if earlier is not None:
            logits[i] = logits[i] * (1.0 - momentum) + earlier * momentum
    scores, partition, spread = scores_of(logits)
    # with ``shared``, the saliency excludes the experts' uncond, but the partition must show if it is non-finite
    for i in range(1, models) if shared else ():
        partition[i] += 0.0 * uncond[i].sum((1, -2, -1), dtype=torch.float32).flatten()
    if quota is not None:
        bias, region = assign_quotas(quota, bias, region, scores, spread, softness is None)
    for i in range(1, models):
        unit = spread[i].view(*logits.shape[1:-2], 1, 1)
        if bias[i] != 0.0:
            scores[i] = scores[i] + bias[i] * unit
        if (added := region[i]) is not None:
            scores[i] = scores[i] + torch.where(added.isinf(), added, added * unit)
    if softness is None:
        return *_hard(cond, uncond, gain, scores), partition, logits, spread
    temperature = softness * _mean_spread(spread).view(*logits.shape[1:-2], 1, 1)
    scores = torch.stack(scores)
    forced = torch.isposinf(scores) if any(r is not None for r in region) else None
    scores = scores / temperature
    if forced is not None:
        scores = torch.where(forced.any(0), torch.where(forced, 0.0, float("-inf")), scores)
    return *_soft(cond, uncond, gain, scores), partition, logits, spread
