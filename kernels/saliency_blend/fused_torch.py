"""Saliency-aware noise blending in few passes of torch ops: what runs wherever Triton does not.

What makes it cheaper than the definition: smoothing commutes with the channel mean, so one map per model is smoothed
instead of C; all models share one stack of maps, so a step on maps is one op however many they are; a hard mask selects
instead of multiplying, which also keeps every selected prediction bit for bit; and on a CPU the predictions are taken
in pieces that stay in its cache from one op to the next.

The bits of a map do not depend on its place in the stack: equal experts score equally in any order of the chain. That
is why the stack only sees ops that round each element once (add, multiply) or reduce each map alone, and no matmul,
lerp or addcmul, whose last bit may differ between the body of a loop and its tail.
"""

from collections.abc import Iterator, Sequence
from types import EllipsisType
from typing import TypeAlias

import torch
from torch import Tensor

from .reference import smooth

# Elements, 4 MiB of float32. Two and four models at 4x16x256x256 on one core: 20 and 66 ms; uncut 24 and 130; at a
# quarter of it 20 and 60, but with four times as many waits for threads, which a busy machine makes long.
PIECE = 1 << 20
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element
Piece: TypeAlias = tuple[slice, EllipsisType, slice, slice]


def _pieces(prediction: Tensor) -> Iterator[Piece | None]:
    """What cuts [B, C, *S] and [B, *S] alike into samples and rows of about ``PIECE`` elements; None: leave it whole."""
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
    """The sums of ``count`` neighbours along ``axis``, which becomes ``count`` - 1 shorter, by doubling."""
    if count == 1:
        return x
    half = count // 2
    length = x.shape[axis] - count + 1
    halves = _window(x, half, axis)
    out = halves.narrow(axis, 0, length) + halves.narrow(axis, half, length)
    return out + x.narrow(axis, count - 1, length) if count % 2 else out


def _shares(n: int, device: torch.device) -> Tensor:
    """How much of each of ``n`` stretched positions is its earlier box sum; the outermost lie wholly in the picture."""
    shares = torch.linspace(0.5 / n, 1.0 - 0.5 / n, n, device=device)
    shares[0], shares[-1] = 0.0, 1.0
    return shares


def _stretch(x: Tensor, axis: int, shares: Tensor) -> Tensor:
    """n + 1 box sums at half positions to n positions: what bilinear interpolation makes of the inner n - 1."""
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
    quick = blur > 1 and min(height, width) > 1  # a picture thinner than two is averaged over fewer positions
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


def _guide(cond: Sequence[Tensor], uncond: Sequence[Tensor], gain: list[float]) -> list[Tensor]:
    return [c if g == 1.0 else torch.lerp(u, c, g) for c, u, g in zip(cond, uncond, gain, strict=True)]


def _select(models: list[Tensor], wins: list[Tensor]) -> Tensor:
    """Of N predictions [B, C, *S] the last whose ``wins`` [B, 1, *S] holds, else the first."""
    out = models[0]
    for model, won in zip(models[1:], wins, strict=True):
        out = torch.where(won, model, out)
    return out


def _overlay(out: Tensor, models: Sequence[Tensor], wins: Sequence[Tensor]) -> None:
    """``_select`` into ``out``, on the bits of the predictions: whole vectors, where torch.where takes single elements.

    51 instead of 117 us for one of two predictions of 4x4x128x128.
    """
    torch.bitwise_xor(models[0], models[1], out=out)
    out *= wins[0]
    out ^= models[0]
    for model, won in zip(models[2:], wins[1:], strict=True):
        change = out ^ model
        change *= won
        out ^= change


def _compete(scores: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The owner of every position uint8 [B, *S], and of every expert [B, 1, *S] where it beats all models before it."""
    best, wins = scores[0], []
    owner = None
    for i in range(1, len(scores)):
        best = best if i == 1 else torch.maximum(best, scores[i - 1])
        won = scores[i] > best  # strictly: the base, then chain order, keeps a tie
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


def _soft(
    cond: list[Tensor], uncond: list[Tensor], gain: list[float], scores: Tensor, softness: float
) -> tuple[Tensor, Tensor, Tensor]:
    like = cond[0]
    weights = torch.softmax(scores / softness, dim=0)
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
    blur: int,
    shared: bool,
    softness: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``kernels.saliency_blend.saliency_blend``."""
    logits = _logits(cond, [uncond[0]] * len(uncond) if shared else uncond, sigma, strength, blur)
    logs = torch.log_softmax(logits.flatten(-2), dim=-1).view_as(logits)
    # x - ln softmax(x) is the same LSE at every position, and finite only where all of them are
    partition = (logits[..., 0, 0] - logs[..., 0, 0]).flatten(1)
    scores = list(logs.unbind(0))
    for i in range(len(cond)):
        if shared and i > 0:  # the saliency has not looked at it: what is not finite must still show
            partition[i] += 0.0 * uncond[i].sum((1, -2, -1), dtype=torch.float32).flatten()
        if bias[i] != 0.0:
            scores[i] = scores[i] + bias[i]
        if (added := region[i]) is not None:
            scores[i] = scores[i] + added
    if softness is None:
        return *_hard(cond, uncond, gain, scores), partition
    scores = torch.stack(scores)
    if any(r is not None for r in region):
        forced = torch.isposinf(scores)
        scores = torch.where(forced.any(0), torch.where(forced, 0.0, float("-inf")), scores)
    return *_soft(cond, uncond, gain, scores, softness), partition
