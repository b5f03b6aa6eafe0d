"""Saliency-aware noise blending in one Triton launch, or two where a sample does not fit one program.

What is computed is said in ``reference.py``. A sample is one picture, or one frame of a video, b T + t; its positions
are p = y W + x. First each model's k Λ and, per tile, the maximum and the sum of exp that make the log-sum-exp; then,
position by position, the scores, the owner (or the weights) and both predictions.

Smoothing is linear and separable, Λ = R_y S R_xᵀ: the bands R of the box and of its stretch are built from their
formula in registers, never loaded. Of a hard mask only the winner's predictions are read, and they are copied, so
that every bit of them is kept.
"""

from collections.abc import Sequence
from math import gcd, prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_MODELS = 8
# What one program may hold without spilling registers: positions, sides rounded up to powers of two, and models.
#
# Of ptxas 12.8 for sm_80 and sm_90, registers (shared memory in KiB), no spills:
#   one launch of 64x64, hard and soft, 16 warps for 2 models, 8 for 4    108 to 128 (32), 180 to 240 (32)
#   saliency, windows of 32x64, blur to 17; to 64                        63 to 178 (24); 64 to 107 (24)
#   select, hard, fp16: 2, 4, 8 models                                   93, 137, 245 (0)
# 16 warps would spill with four models, and 8 with eight. Left to itself ptxas for sm_90 takes 64 registers and spills
# 24 bytes: one launch says how many it may have. Rows that are no multiple of 16 positions, read one element at a
# time, spill up to 52 bytes with four models.
ONE_PROGRAM, ONE_PROGRAM_MODELS = 4096, 4


@triton.jit
def _pick(values: tl.tuple, n: tl.tensor) -> tl.tensor:
    """values[n] of a tuple, for an n that only the running program knows."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(n == i, values[i], value)
    return value


@triton.jit
def _band(i: tl.tensor, s: tl.tensor, n: tl.tensor, blur: tl.tensor) -> tl.tensor:
    """R [I, S] times the side of the box: what input ``s`` [1, S] or [S, 1] weighs in the smoothed position ``i``.

    An even box leaves an axis one position short, and the stretch back to ``n`` puts position i between the averages
    i - 1 and i, at (i + 1/2) / n of the former.
    """
    pad = (blur - 1) // 2
    box = tl.minimum(blur, n + 2 * pad)
    even = 1 - blur % 2
    last = tl.maximum(n - 1 - even, 0)
    share = even * (i + 0.5) / n
    before = tl.minimum(tl.maximum(i - even, 0), last) - pad
    after = tl.minimum(i, last) - pad
    in_before = (s >= before) & (s < before + box)
    in_after = (s >= after) & (s < after + box)
    return tl.where(in_before, share, 0.0) + tl.where(in_after, 1.0 - share, 0.0)


@triton.jit
def _difference(
    cond_ptr: tl.tensor, uncond_ptr: tl.tensor, reference_ptr: tl.tensor, base: tl.tensor, channel_stride: tl.tensor,
    offsets: tl.tensor, inside: tl.tensor,
    CHANNELS: tl.constexpr, AT_ONCE: tl.constexpr, SHARED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Σ_C |c - u| at ``offsets``, 0 where they are not ``inside``."""
    total = tl.zeros(offsets.shape, tl.float32)
    for channel in tl.range(0, CHANNELS, loop_unroll_factor=AT_ONCE):
        at = base + tl.cast(channel, tl.int64) * channel_stride
        c = tl.load(cond_ptr + at + offsets, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(reference_ptr + at + offsets, mask=inside, other=0.0).to(tl.float32)
        total += tl.abs(c - u)
        if SHARED:  # measured against the base's uncond; what is not finite in the model's own must still show
            total += 0.0 * tl.load(uncond_ptr + at + offsets, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _measure(
    model: tl.tensor, sample: tl.tensor, samples: tl.tensor, tile: tl.tensor, tiles: tl.tensor, top: tl.tensor,
    left: tl.tensor, cond: tl.tuple, uncond: tl.tuple, sigma_ptr: tl.tensor, strength: tl.tuple, logits_ptr: tl.tensor,
    partials_ptr: tl.tensor, frames: tl.tensor, height: tl.tensor, width: tl.tensor, plane: tl.tensor, blur: tl.tensor,
    margin: tl.tensor, tile_height: tl.tensor,
    CHANNELS: tl.constexpr, AT_ONCE: tl.constexpr, SHARED: tl.constexpr, STEPS_H: tl.constexpr, STEPS_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, MARGIN_W: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    TILE_W: tl.constexpr,
) -> None:  # fmt: skip
    """Store k Λ of one model in the tile at (``top``, ``left``) of one sample, its maximum and its sum of exp."""
    cond_ptr, uncond_ptr = _pick(cond, model), _pick(uncond, model)
    reference_ptr = uncond[0] if SHARED else uncond_ptr
    channel_stride = tl.cast(plane, tl.int64) * frames
    base = (sample // frames).to(tl.int64) * CHANNELS * channel_stride + (sample % frames).to(tl.int64) * plane

    y = top + tl.arange(0, BLOCK_H)
    x = left + tl.arange(0, BLOCK_W)
    smoothed = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    for step_h in range(STEPS_H):
        window_y = top - margin + step_h * STEP_H + tl.arange(0, STEP_H)
        along_x = tl.zeros([STEP_H, BLOCK_W], tl.float32)
        for step_w in range(STEPS_W):
            window_x = left - MARGIN_W + step_w * STEP_W + tl.arange(0, STEP_W)
            inside = ((window_y >= 0) & (window_y < height))[:, None] & ((window_x >= 0) & (window_x < width))[None, :]
            offsets = window_y[:, None] * width + window_x[None, :]
            saliency = _difference(
                cond_ptr, uncond_ptr, reference_ptr, base, channel_stride, offsets, inside, CHANNELS, AT_ONCE, SHARED
            )  # [STEP_H, STEP_W]
            columns = _band(x[None, :], window_x[:, None], width, blur)  # [STEP_W, BLOCK_W]
            along_x = tl.dot(saliency, columns, along_x, input_precision="ieee")
        rows = _band(y[:, None], window_y[None, :], height, blur)  # [BLOCK_H, STEP_H]
        smoothed = tl.dot(rows, along_x, smoothed, input_precision="ieee")

    pad = (blur - 1) // 2
    area = tl.minimum(blur, height + 2 * pad) * tl.minimum(blur, width + 2 * pad)
    sigma = tl.load(sigma_ptr + sample // frames).to(tl.float32)
    logits = smoothed * (tl.cast(_pick(strength, model), tl.float32) / (sigma * area * CHANNELS))
    mine = ((y < height) & (y < top + tile_height))[:, None] & ((x < width) & (x < left + TILE_W))[None, :]
    row = tl.cast(model, tl.int64) * samples + sample
    tl.store(logits_ptr + row * plane + (y[:, None] * width + x[None, :]), logits, mask=mine)
    logits = tl.where(mine, logits, float("-inf"))
    largest = tl.max(logits)
    partial_ptr = partials_ptr + (row * tiles + tile) * 2
    tl.store(partial_ptr, largest)
    tl.store(partial_ptr + 1, tl.sum(tl.exp(logits - largest)))


@triton.jit
def _partition(partials_ptr: tl.tensor, tiles: tl.tensor, TILES: tl.constexpr) -> tl.tensor:
    """The log-sum-exp of one model and sample out of those of its tiles."""
    tile = tl.arange(0, TILES)
    largest = tl.load(partials_ptr + 2 * tile, mask=tile < tiles, other=float("-inf"))
    total = tl.load(partials_ptr + 2 * tile + 1, mask=tile < tiles, other=0.0)
    top = tl.max(largest)
    return top + tl.log(tl.sum(total * tl.exp(largest - top)))


@triton.jit
def _guide(c: tl.tensor, u: tl.tensor, gain: tl.tensor) -> tl.tensor:
    """c itself, bit for bit, at a gain of 1."""
    return tl.where(gain == 1.0, c, u + gain * (c - u))


@triton.jit
def _paint(
    block: tl.tensor, sample: tl.tensor, samples: tl.tensor, tiles: tl.tensor, cond: tl.tuple, uncond: tl.tuple,
    bias: tl.tuple, region: tl.tuple, steps_b: tl.tuple, steps_t: tl.tuple, steps_y: tl.tuple, steps_x: tl.tuple,
    gain: tl.tuple, logits_ptr: tl.tensor, partials_ptr: tl.tensor, out_cond_ptr: tl.tensor, out_uncond_ptr: tl.tensor,
    weights_ptr: tl.tensor, partition_ptr: tl.tensor, frames: tl.tensor, width: tl.tensor, plane: tl.tensor,
    softness: tl.tensor,
    CHANNELS: tl.constexpr, TILES: tl.constexpr, SOFT: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
    SELECT_AT_ONCE: tl.constexpr,
) -> None:  # fmt: skip
    """Decide GROUPS x VECTOR positions of one sample and store what was decided."""
    models: tl.constexpr = len(cond)
    p = (block * GROUPS + tl.arange(0, GROUPS)[:, None]) * VECTOR + tl.arange(0, VECTOR)[None, :]
    inside = p < plane
    batch, frame = (sample // frames).to(tl.int64), (sample % frames).to(tl.int64)
    y, x = p // width, p % width

    best = tl.full(p.shape, float("-inf"), tl.float32)
    owner = tl.zeros(p.shape, tl.int32)
    scores = ()
    for n in tl.static_range(models):
        row = tl.cast(sample, tl.int64) + tl.cast(samples, tl.int64) * n
        partition = _partition(partials_ptr + row * tiles * 2, tiles, TILES)
        if block == 0:
            tl.store(partition_ptr + row, partition)
        score = tl.load(logits_ptr + row * plane + p, mask=inside, other=0.0) - partition + tl.cast(bias[n], tl.float32)
        if region[n] is not None:
            here = batch * steps_b[n] + frame * steps_t[n] + (y * steps_y[n] + x * steps_x[n])
            score += tl.load(region[n] + here, mask=inside, other=0.0).to(tl.float32)
        if n == 0:
            best = score
        else:
            wins = score > best  # strictly: the base, then chain order, keeps a tie
            best = tl.where(wins, score, best)
            owner = tl.where(wins, n, owner)
        if SOFT:
            scores = scores + (score,)  # noqa: RUF005 (Triton reads no stars)

    weights = ()
    if SOFT:
        softness = tl.cast(softness, tl.float32)
        # where a region forces models, they share the position alone
        forced = best == float("inf")
        total = tl.zeros(p.shape, tl.float32)
        for n in tl.static_range(models):
            weight = tl.where(scores[n] == float("inf"), 1.0, 0.0)
            weight = tl.where(forced, weight, tl.exp((scores[n] - best) / softness))
            weights = weights + (weight,)  # noqa: RUF005
            total += weight
        for n in tl.static_range(models):
            row = tl.cast(sample, tl.int64) + tl.cast(samples, tl.int64) * n
            tl.store(weights_ptr + row * plane + p, weights[n] / total, mask=inside)
    else:
        total = best
        tl.store(weights_ptr + sample.to(tl.int64) * plane + p, owner.to(tl.uint8), mask=inside)

    channel_stride = tl.cast(plane, tl.int64) * frames
    base = batch * CHANNELS * channel_stride + frame * plane
    for first in range(0, CHANNELS, SELECT_AT_ONCE):
        blended = ()
        for k in tl.static_range(SELECT_AT_ONCE):  # read them all before the first store, which no load may pass
            at = base + tl.cast(first + k, tl.int64) * channel_stride
            out_cond = tl.zeros(p.shape, tl.float32)
            out_uncond = tl.zeros(p.shape, tl.float32)
            for n in tl.static_range(models):
                if SOFT:
                    c = tl.load(cond[n] + at + p, mask=inside, other=0.0).to(tl.float32)
                    u = tl.load(uncond[n] + at + p, mask=inside, other=0.0).to(tl.float32)
                    weight = weights[n] / total
                    out_cond += weight * _guide(c, u, tl.cast(gain[n], tl.float32))
                    out_uncond += weight * u
                else:
                    mine = owner == n
                    # whole vectors: the mask is constant along the inner axis, so that the loads stay wide
                    wanted = (tl.max(mine.to(tl.int32), 1, keep_dims=True) > 0) & inside
                    c = tl.load(cond[n] + at + p, mask=wanted, other=0.0).to(tl.float32)
                    u = tl.load(uncond[n] + at + p, mask=wanted, other=0.0).to(tl.float32)
                    out_cond = tl.where(mine, _guide(c, u, tl.cast(gain[n], tl.float32)), out_cond)
                    out_uncond = tl.where(mine, u, out_uncond)
            blended = blended + (out_cond, out_uncond)  # noqa: RUF005
        for k in tl.static_range(SELECT_AT_ONCE):
            at = base + tl.cast(first + k, tl.int64) * channel_stride
            tl.store(out_cond_ptr + at + p, blended[2 * k].to(out_cond_ptr.dtype.element_ty), mask=inside)
            tl.store(out_uncond_ptr + at + p, blended[2 * k + 1].to(out_uncond_ptr.dtype.element_ty), mask=inside)


_RUNTIME = ["frames", "blur", "margin", "tile_height", "tiles"]  # no variant of the code for each value


@triton.jit(do_not_specialize=_RUNTIME)
def _saliency_kernel(
    cond: tl.tuple, uncond: tl.tuple, sigma_ptr: tl.tensor, strength: tl.tuple, logits_ptr: tl.tensor,
    partials_ptr: tl.tensor, frames: tl.tensor, height: tl.tensor, width: tl.tensor, plane: tl.tensor, blur: tl.tensor,
    margin: tl.tensor, tile_height: tl.tensor,
    CHANNELS: tl.constexpr, AT_ONCE: tl.constexpr, SHARED: tl.constexpr, STEPS_H: tl.constexpr, STEPS_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, MARGIN_W: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    TILE_W: tl.constexpr,
) -> None:  # fmt: skip
    """First of two launches; grid (tiles, models, samples)."""
    tile = tl.program_id(0)
    across = tl.cdiv(width, TILE_W)
    _measure(
        tl.program_id(1), tl.program_id(2), tl.num_programs(2), tile, tl.num_programs(0),
        tile // across * tile_height, tile % across * TILE_W,
        cond, uncond, sigma_ptr, strength, logits_ptr, partials_ptr,
        frames, height, width, plane, blur, margin, tile_height,
        CHANNELS, AT_ONCE, SHARED, STEPS_H, STEPS_W, STEP_H, STEP_W, MARGIN_W, BLOCK_H, BLOCK_W, TILE_W,
    )  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def _select_kernel(
    cond: tl.tuple, uncond: tl.tuple, bias: tl.tuple, region: tl.tuple, steps_b: tl.tuple, steps_t: tl.tuple,
    steps_y: tl.tuple, steps_x: tl.tuple, gain: tl.tuple, logits_ptr: tl.tensor, partials_ptr: tl.tensor,
    out_cond_ptr: tl.tensor, out_uncond_ptr: tl.tensor, weights_ptr: tl.tensor, partition_ptr: tl.tensor,
    frames: tl.tensor, width: tl.tensor, plane: tl.tensor, tiles: tl.tensor, softness: tl.tensor,
    CHANNELS: tl.constexpr, TILES: tl.constexpr, SOFT: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
    SELECT_AT_ONCE: tl.constexpr,
) -> None:  # fmt: skip
    """Second of two launches; grid (blocks, samples), walked backwards: what was read last is still in the L2 cache."""
    _paint(
        tl.num_programs(0) - 1 - tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1), tl.num_programs(1), tiles,
        cond, uncond, bias, region, steps_b, steps_t, steps_y, steps_x, gain, logits_ptr, partials_ptr,
        out_cond_ptr, out_uncond_ptr, weights_ptr, partition_ptr,
        frames, width, plane, softness, CHANNELS, TILES, SOFT, GROUPS, VECTOR, SELECT_AT_ONCE,
    )  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def _saliency_blend_kernel(
    cond: tl.tuple, uncond: tl.tuple, sigma_ptr: tl.tensor, strength: tl.tuple, bias: tl.tuple, region: tl.tuple,
    steps_b: tl.tuple, steps_t: tl.tuple, steps_y: tl.tuple, steps_x: tl.tuple, gain: tl.tuple, logits_ptr: tl.tensor,
    partials_ptr: tl.tensor, out_cond_ptr: tl.tensor, out_uncond_ptr: tl.tensor, weights_ptr: tl.tensor,
    partition_ptr: tl.tensor, frames: tl.tensor, height: tl.tensor, width: tl.tensor, plane: tl.tensor, blur: tl.tensor,
    softness: tl.tensor,
    CHANNELS: tl.constexpr, AT_ONCE: tl.constexpr, SHARED: tl.constexpr, SOFT: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr,
    VECTOR: tl.constexpr, SELECT_AT_ONCE: tl.constexpr,
) -> None:  # fmt: skip
    """The only launch where a sample fits one program; grid (samples,)."""
    sample, samples = tl.program_id(0), tl.num_programs(0)
    for model in range(len(cond)):
        _measure(
            model, sample, samples, 0, 1, 0, 0,
            cond, uncond, sigma_ptr, strength, logits_ptr, partials_ptr,
            frames, height, width, plane, blur, 0, height,
            CHANNELS, AT_ONCE, SHARED,
            BLOCK_H // STEP_H, BLOCK_W // STEP_W, STEP_H, STEP_W, 0, BLOCK_H, BLOCK_W, BLOCK_W,
        )  # fmt: skip
    tl.debug_barrier()  # what other threads of this program stored is read from here on
    for block in range(BLOCKS):
        _paint(
            block, sample, samples, 1,
            cond, uncond, bias, region, steps_b, steps_t, steps_y, steps_x, gain, logits_ptr, partials_ptr,
            out_cond_ptr, out_uncond_ptr, weights_ptr, partition_ptr,
            frames, width, plane, softness, CHANNELS, 1, SOFT, GROUPS, VECTOR, SELECT_AT_ONCE,
        )  # fmt: skip


def _steps(region: Tensor | None, positions: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Steps of ``region`` in memory along (b, t, y, x), 0 where it is broadcast to ``positions`` [B, *S]."""
    if region is None:
        return 0, 0, 0, 0
    step_b, *step_t, step_y, step_x = region.expand(positions).stride()
    return step_b, step_t[0] if step_t else 0, step_y, step_x


INTERPRETED = not isinstance(_select_kernel, triton.JITFunction)  # TRITON_INTERPRET=1: numpy on the CPU, for tests


class _Tiling(NamedTuple):
    """Tiles of ``height`` x ``width`` positions, each read through a window of steps_h x steps_w times 32 x 64."""

    height: int
    width: int
    steps_h: int
    steps_w: int
    margin_w: int  # whole vectors of 8, so that windows start aligned


def _tiling(blur: int) -> _Tiling:
    steps_h, steps_w, margin_w = (1, 1, 8) if blur <= 17 else (2 if blur <= 33 else 3, 2, 32)
    return _Tiling(min(32, 32 * steps_h - blur // 2 * 2), 64 * steps_w - 2 * margin_w, steps_h, steps_w, margin_w)


def _outputs(like: Tensor, models: int, soft: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cond, uncond, weights and partition, not yet written, for predictions shaped as ``like`` [B, C, *S]."""
    batch, _, *axes = like.shape
    weights = ((models, batch, *axes), torch.float32) if soft else ((batch, *axes), torch.uint8)
    partition = ((models, batch * prod(axes[:-2])), torch.float32)
    blended = (like.shape, like.dtype)
    out_cond, out_uncond, out_weights, out_partition = (
        torch.empty(shape, dtype=dtype, device=like.device) for shape, dtype in (blended, blended, weights, partition)
    )
    return out_cond, out_uncond, out_weights, out_partition


def _launch(
    cond: Sequence[Tensor],
    uncond: Sequence[Tensor],
    sigma: Tensor,
    strength: Sequence[float],
    bias: Sequence[float],
    region: Sequence[Tensor | None],
    gain: Sequence[float],
    blur: int,
    shared: bool,
    softness: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like, models, soft = cond[0], len(cond), softness is not None
    batch, channels, *axes = like.shape
    height, width = axes[-2:]
    frames, plane = prod(axes[:-2]), height * width
    samples = batch * frames
    outputs = _outputs(like, models, soft)

    cond, uncond = (tuple(t.contiguous() for t in side) for side in (cond, uncond))
    strength, bias, gain = (tuple(map(float, scalars)) for scalars in (strength, bias, gain))
    steps = tuple(zip(*(_steps(r, (batch, *axes)) for r in region), strict=True))

    block_h, block_w = (max(16, triton.next_power_of_2(n)) for n in (height, width))
    one = models <= ONE_PROGRAM_MODELS and max(block_h, block_w) <= 128 and block_h * block_w <= ONE_PROGRAM
    tiling = _tiling(blur)
    tiles = 1 if one else triton.cdiv(height, tiling.height) * triton.cdiv(width, tiling.width)
    logits, partials = (
        torch.empty((models, samples, *rest), dtype=torch.float32, device=like.device)
        for rest in ((plane,), (tiles, 2))
    )

    vector = 16 // like.dtype.itemsize  # positions that one load of 16 bytes brings
    measure = (cond, uncond, sigma.contiguous(), strength)
    decide = (bias, tuple(region), *steps, gain, logits, partials, *outputs)
    softness = softness if soft else 1.0
    # Channels in flight, against the latency of memory: fewer where each takes more registers and more code
    at_once = 4 if width % 16 == 0 and not shared else 2
    options = {
        "CHANNELS": channels,
        "VECTOR": vector,
        "SELECT_AT_ONCE": gcd(channels, 4 if models <= 2 and not (soft or one) else 2 if models <= 4 else 1),
        "num_stages": 1,
    }
    with torch.cuda.device_of(like):
        if one:
            warps = min(16 if models <= 2 else 8, block_h * block_w // 256)
            _saliency_blend_kernel[(samples,)](
                *measure, *decide, frames, height, width, plane, blur, softness,
                AT_ONCE=at_once, SHARED=shared, SOFT=soft, BLOCK_H=block_h, BLOCK_W=block_w,
                STEP_H=16 if block_h > 64 else min(32, block_h), STEP_W=min(64, block_w),
                BLOCKS=triton.cdiv(plane, 32 * warps * vector), GROUPS=32 * warps, num_warps=warps,
                maxnreg=min(255, 2048 // warps), **options,
            )  # fmt: skip
        else:
            _saliency_kernel[(tiles, models, samples)](
                *measure, logits, partials, frames, height, width, plane, blur, blur // 2, tiling.height,
                CHANNELS=channels, AT_ONCE=at_once, SHARED=shared, STEPS_H=tiling.steps_h, STEPS_W=tiling.steps_w,
                STEP_H=32, STEP_W=64, MARGIN_W=tiling.margin_w, BLOCK_H=32, BLOCK_W=64, TILE_W=tiling.width,
                num_warps=8, num_stages=1,
            )  # fmt: skip
            _select_kernel[(triton.cdiv(plane, 128 * vector), samples)](
                cond, uncond, *decide, frames, width, plane, tiles, softness,
                SOFT=soft, TILES=triton.next_power_of_2(tiles), GROUPS=128, num_warps=4, **options,
            )  # fmt: skip
    return outputs


def _fake(
    cond: Sequence[Tensor],
    uncond: Sequence[Tensor],
    sigma: Tensor,
    strength: Sequence[float],
    bias: Sequence[float],
    region: Sequence[Tensor | None],
    gain: Sequence[float],
    blur: int,
    shared: bool,
    softness: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the shapes and dtypes of ``_launch``, for torch.compile."""
    return _outputs(cond[0], len(cond), softness is not None)


def _register() -> None:
    """Make ``torch.ops.chorus.saliency_blend``, an operator that torch.compile leaves whole."""
    if hasattr(torch.ops.chorus, "saliency_blend"):
        return  # the pack is imported twice, under two names: ComfyUI's and another's
    operator = torch.library.custom_op(
        "chorus::saliency_blend",
        _launch,
        mutates_args=(),
        schema="(Tensor[] cond, Tensor[] uncond, Tensor sigma, float[] strength, float[] bias, Tensor?[] region,"
        " float[] gain, int blur, bool shared, float? softness) -> (Tensor, Tensor, Tensor, Tensor)",
    )
    operator.register_fake(_fake)


_register()


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
    # the operator's dispatch would cost an eager call more than the launches
    run = torch.ops.chorus.saliency_blend if torch.compiler.is_compiling() else _launch
    return run(cond, uncond, sigma, strength, bias, region, gain, blur, shared, softness)
