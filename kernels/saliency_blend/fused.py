"""Saliency-aware noise blending in one Triton launch, or in three launches if a sample does not fit one program.

``reference.py`` is the definition. A sample is one image, or one frame of a video: frame t of video b has the index
b T + t. The position (y, x) of a sample has the index p = y W + x. The three parts of the computation:
1. k Λ of each model (strength times smoothed saliency). Also, for each tile, the maximum m of k Λ and the sums of
   exp(k Λ - m) and exp(k Λ - m) - 1. From these, part 3 computes ln of the mean of exp(k Λ) over all positions;
2. for each block of positions, the mean of each expert's lead over the base, and the sum of the squared deviations of
   the lead from this mean. From these, part 3 computes the spread: the standard deviation of the lead over all
   positions;
3. for each position, the scores, the winner (or the weights) and both blended predictions.

Smoothing the saliency S is linear and separable: Λ = R_y S R_xᵀ. The band matrices R average over the box and stretch
the result (see ``_band``). They are computed in registers and never loaded. With a hard mask, only the winner's
predictions are read, and they are copied bit for bit.
"""

from collections.abc import Sequence
from math import gcd, prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused_torch import scores_of
from .quota import assign_quotas
from .reference import ROUNDING

MAX_MODELS = 8
# Largest number of positions (with sides rounded up to powers of two) and of models in one program without register
# spills.
#
# Registers per thread, and KiB of shared memory in brackets, from ptxas 12.8 for sm_80 and sm_90, all without spills:
#   single launch, 64x64 positions, hard and soft masks, 2 models with 16 warps    108 to 128 (32)
#   single launch, 64x64 positions, hard and soft masks, 4 models with 8 warps     180 to 240 (32)
#   first of three launches, windows of 32x64, blur up to 17                       63 to 178 (24)
#   first of three launches, windows of 32x64, blur up to 64                       64 to 107 (24)
#   last of three launches, hard mask, float16, 2 models                           93 (0)
#   last of three launches, hard mask, float16, 4 models                           137 (0)
#   last of three launches, hard mask, float16, 8 models                           245 (0)
# 16 warps would spill with four models, and 8 warps with eight models. Without maxnreg, ptxas for sm_90 uses 64
# registers in the single launch and spills 24 bytes. Exception: if the width of the latent is not a multiple of 16
# positions, its rows are read one element at a time; with four models the program then spills up to 52 bytes.
ONE_PROGRAM, ONE_PROGRAM_MODELS = 4096, 4
_ROUNDING = tl.constexpr(ROUNDING)
LEAD_BLOCK = 2048  # positions in one block of leads, see _measure_lead


@triton.jit
def _pick(values: tl.tuple, n: tl.tensor) -> tl.tensor:
    """values[n] of a tuple, for an n that is known only at run time."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(n == i, values[i], value)
    return value


@triton.jit
def _box(n: tl.tensor, blur: tl.tensor) -> tl.tensor:
    """The side of the box along an axis of ``n`` positions: 1 for a single position, which is not smoothed."""
    return tl.where(n == 1, 1, tl.minimum(blur, n + (blur - 1) // 2 * 2))


@triton.jit
def _band(i: tl.tensor, s: tl.tensor, n: tl.tensor, blur: tl.tensor) -> tl.tensor:
    """R times the side of the box: the weight of input position ``s`` in the smoothed position ``i``, along one axis.

    ``i`` and ``s`` broadcast to the shape of R. A box with an even side makes the axis one position shorter. The
    stretch back to ``n`` positions interpolates position i between the averages i - 1 and i. The average i - 1 has the
    weight (i + 1/2) / n.
    """
    pad = tl.where(n == 1, 0, (blur - 1) // 2)
    box = _box(n, blur)
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
    """The sum over the channels of |c - u| at ``offsets``, with c from ``cond_ptr`` and u from ``reference_ptr``.

    It is 0 outside ``inside``.
    """
    total = tl.zeros(offsets.shape, tl.float32)
    for channel in tl.range(0, CHANNELS, loop_unroll_factor=AT_ONCE):
        at = base + tl.cast(channel, tl.int64) * channel_stride
        c = tl.load(cond_ptr + at + offsets, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(reference_ptr + at + offsets, mask=inside, other=0.0).to(tl.float32)
        total += tl.abs(c - u)
        if SHARED:  # u is the base's uncond; a non-finite value in the model's own uncond must still show in the result
            total += 0.0 * tl.load(uncond_ptr + at + offsets, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _expm1(x: tl.tensor) -> tl.tensor:
    """exp(x) - 1 for x <= 0, with a relative error of a few float32 roundings, also near 0."""
    series = 1.0 + x * (1.0 / 8.0)
    series = 1.0 + x * (1.0 / 7.0) * series
    series = 1.0 + x * (1.0 / 6.0) * series
    series = 1.0 + x * (1.0 / 5.0) * series
    series = 1.0 + x * (1.0 / 4.0) * series
    series = 1.0 + x * (1.0 / 3.0) * series
    series = 1.0 + x * (1.0 / 2.0) * series
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def _log1p(y: tl.tensor) -> tl.tensor:
    """ln(1 + y) for -1/2 <= y <= 0, with a relative error of a few float32 roundings, also near 0."""
    z = y / (2.0 + y)
    s = z * z
    series = 1.0 / 11.0 + s * (1.0 / 13.0)
    series = 1.0 / 9.0 + s * series
    series = 1.0 / 7.0 + s * series
    series = 1.0 / 5.0 + s * series
    series = 1.0 / 3.0 + s * series
    return 2.0 * z * (1.0 + s * series)


@triton.jit
def _measure(
    model: tl.tensor, sample: tl.tensor, samples: tl.tensor, tile: tl.tensor, tiles: tl.tensor, top: tl.tensor,
    left: tl.tensor, cond: tl.tuple, uncond: tl.tuple, sigma_ptr: tl.tensor, strength: tl.tuple,
    memory_ptr: tl.tensor | None, momentum: tl.tuple, logits_ptr: tl.tensor, partials_ptr: tl.tensor,
    frames: tl.tensor, height: tl.tensor, width: tl.tensor, plane: tl.tensor, blur: tl.tensor, margin: tl.tensor,
    tile_height: tl.tensor,
    CHANNELS: tl.constexpr, AT_ONCE: tl.constexpr, SHARED: tl.constexpr, STEPS_H: tl.constexpr, STEPS_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, MARGIN_W: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    TILE_W: tl.constexpr,
) -> None:  # fmt: skip
    """Store k Λ of one model in the tile at (``top``, ``left``) of one sample.

    Also store the tile's maximum, sums and number of positions, from which ``_partition`` computes ln of the mean
    exp(k Λ).
    """
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

    area = _box(height, blur) * _box(width, blur)
    sigma = tl.load(sigma_ptr + sample // frames).to(tl.float32)
    logits = smoothed * (tl.cast(_pick(strength, model), tl.float32) / (sigma * area * CHANNELS))
    mine = ((y < height) & (y < top + tile_height))[:, None] & ((x < width) & (x < left + TILE_W))[None, :]
    row = tl.cast(model, tl.int64) * samples + sample
    at = row * plane + (y[:, None] * width + x[None, :])
    if memory_ptr is not None:
        kept = tl.cast(_pick(momentum, model), tl.float32)
        logits = logits * (1.0 - kept) + tl.load(memory_ptr + at, mask=mine, other=0.0) * kept
    tl.store(logits_ptr + at, logits, mask=mine)
    largest = tl.max(tl.where(mine, logits, float("-inf")))
    below = logits - largest
    partial_ptr = partials_ptr + (row * tiles + tile) * 4
    tl.store(partial_ptr, largest)
    tl.store(partial_ptr + 1, tl.sum(tl.where(mine, tl.exp(below), 0.0)))
    tl.store(partial_ptr + 2, tl.sum(tl.where(mine, _expm1(below), 0.0)))
    tl.store(partial_ptr + 3, tl.sum(tl.where(mine, 1.0, 0.0)))


@triton.jit
def _partition(
    partials_ptr: tl.tensor, tiles: tl.tensor, plane: tl.tensor, TILES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """ln of the mean exp(k Λ), and the largest k Λ, of one model in one sample, from the values of its tiles.

    See ``log_mean_exp`` for the two formulas.
    """
    tile = tl.arange(0, TILES)
    inside = tile < tiles
    largest = tl.load(partials_ptr + 4 * tile, mask=inside, other=float("-inf"))
    total = tl.load(partials_ptr + 4 * tile + 1, mask=inside, other=0.0)
    excess = tl.load(partials_ptr + 4 * tile + 2, mask=inside, other=0.0)
    count = tl.load(partials_ptr + 4 * tile + 3, mask=inside, other=0.0)
    top = tl.max(largest)
    apart = tl.where(inside, largest - top, 0.0)
    scale = tl.exp(apart)
    mean = tl.sum(total * scale) / plane
    above = tl.sum(excess * scale + count * _expm1(apart)) / plane
    return top + tl.where(mean < 0.5, tl.log(mean), _log1p(above)), top


@triton.jit
def _measure_lead(
    model: tl.tensor, sample: tl.tensor, samples: tl.tensor, block: tl.tensor, blocks: tl.tensor, logits_ptr: tl.tensor,
    leads_ptr: tl.tensor, plane: tl.tensor, LEAD_BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """For one block of positions, store the mean of the difference between an expert's k Λ and the base's.

    Also store the sum of the squared deviations of the difference from this mean.
    """
    row = tl.cast(model, tl.int64) * samples + sample
    p = block * LEAD_BLOCK + tl.arange(0, LEAD_BLOCK)
    inside = p < plane
    own = tl.load(logits_ptr + row * plane + p, mask=inside, other=0.0)
    lead = own - tl.load(logits_ptr + tl.cast(sample, tl.int64) * plane + p, mask=inside, other=0.0)
    mean = tl.sum(lead) / tl.minimum(LEAD_BLOCK, plane - block * LEAD_BLOCK)
    deviation = tl.where(inside, lead - mean, 0.0)
    lead_ptr = leads_ptr + (row * blocks + block) * 2
    tl.store(lead_ptr, mean)
    tl.store(lead_ptr + 1, tl.sum(deviation * deviation))


@triton.jit
def _spread(
    leads_ptr: tl.tensor, blocks: tl.tensor, plane: tl.tensor, BLOCKS: tl.constexpr, LEAD_BLOCK: tl.constexpr
) -> tl.tensor:
    """The standard deviation of one expert's lead in one sample, combined from its blocks (Chan et al., 1983)."""
    block = tl.arange(0, BLOCKS)
    inside = block < blocks
    count = tl.where(inside, tl.minimum(LEAD_BLOCK, plane - block * LEAD_BLOCK), 0).to(tl.float32)
    means = tl.load(leads_ptr + 2 * block, mask=inside, other=0.0)
    squares = tl.load(leads_ptr + 2 * block + 1, mask=inside, other=0.0)
    apart = means - tl.sum(count * means) / plane
    return tl.sqrt(tl.sum(squares + count * apart * apart) / plane)


@triton.jit
def _guide(c: tl.tensor, u: tl.tensor, gain: tl.tensor) -> tl.tensor:
    """u + gain (c - u); exactly c for a gain of 1."""
    return tl.where(gain == 1.0, c, u + gain * (c - u))


@triton.jit
def _select(
    block: tl.tensor, sample: tl.tensor, samples: tl.tensor, tiles: tl.tensor, cond: tl.tuple, uncond: tl.tuple,
    bias: tl.tuple, region: tl.tuple, steps_b: tl.tuple, steps_t: tl.tuple, steps_y: tl.tuple, steps_x: tl.tuple,
    gain: tl.tuple, logits_ptr: tl.tensor, partials_ptr: tl.tensor, leads_ptr: tl.tensor, out_cond_ptr: tl.tensor,
    out_uncond_ptr: tl.tensor, weights_ptr: tl.tensor, partition_ptr: tl.tensor, spread_ptr: tl.tensor,
    frames: tl.tensor, width: tl.tensor, plane: tl.tensor, lead_blocks: tl.tensor, softness: tl.tensor,
    CHANNELS: tl.constexpr, TILES: tl.constexpr, LEAD_BLOCKS: tl.constexpr, LEAD_BLOCK: tl.constexpr,
    SOFT: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr, SELECT_AT_ONCE: tl.constexpr,
) -> None:  # fmt: skip
    """Choose the model of GROUPS x VECTOR positions of one sample, blend their predictions and store them."""
    models: tl.constexpr = len(cond)
    p = (block * GROUPS + tl.arange(0, GROUPS)[:, None]) * VECTOR + tl.arange(0, VECTOR)[None, :]
    inside = p < plane
    batch, frame = (sample // frames).to(tl.int64), (sample % frames).to(tl.int64)
    y, x = p // width, p % width

    best = tl.full(p.shape, float("-inf"), tl.float32)
    owner = tl.zeros(p.shape, tl.int32)
    scores = ()
    spreads = 0.0
    for n in tl.static_range(models):
        row = tl.cast(sample, tl.int64) + tl.cast(samples, tl.int64) * n
        partition, largest = _partition(partials_ptr + row * tiles * 4, tiles, plane, TILES)
        if block == 0:
            tl.store(partition_ptr + row, partition)
        score = tl.load(logits_ptr + row * plane + p, mask=inside, other=0.0) - partition
        unit = 0.0
        if n == 0:
            base_score, base_largest = score, largest
        else:
            unit = _spread(leads_ptr + row * lead_blocks * 2, lead_blocks, plane, LEAD_BLOCKS, LEAD_BLOCK)
            insignificant = unit <= _ROUNDING * tl.maximum(largest, base_largest)
            unit = tl.where(insignificant, 0.0, unit)
            score = tl.where(insignificant, base_score, score)
            score += tl.cast(bias[n], tl.float32) * unit
            spreads += unit
        if block == 0:
            tl.store(spread_ptr + row, unit)
        if region[n] is not None:
            here = batch * steps_b[n] + frame * steps_t[n] + (y * steps_y[n] + x * steps_x[n])
            added = tl.load(region[n] + here, mask=inside, other=0.0).to(tl.float32)
            score += tl.where(tl.abs(added) == float("inf"), added, added * unit)
        if n == 0:
            best = score
        else:
            wins = score > best  # > and not >=: a tie goes to the base, then to the earlier expert
            best = tl.where(wins, score, best)
            owner = tl.where(wins, n, owner)
        if SOFT:
            scores = scores + (score,)  # noqa: RUF005 (Triton does not support * in a tuple)

    weights = ()
    if SOFT:
        mean_spread = spreads / tl.maximum(models - 1, 1)
        temperature = tl.cast(softness, tl.float32) * tl.where(mean_spread > 0.0, mean_spread, 1.0)
        # the models that a region forces share the position among themselves
        forced = best == float("inf")
        total = tl.zeros(p.shape, tl.float32)
        for n in tl.static_range(models):
            weight = tl.where(scores[n] == float("inf"), 1.0, 0.0)
            weight = tl.where(forced, weight, tl.exp((scores[n] - best) / temperature))
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
        # all loads come before the first store, because the compiler does not move a load before a store
        for k in tl.static_range(SELECT_AT_ONCE):
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
                    # the load mask ``wanted`` has one value per vector, so that whole vectors are loaded
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


_RUNTIME = ["frames", "blur", "margin", "tile_height", "tiles"]  # Triton must not compile a variant for each value


@triton.jit(do_not_specialize=_RUNTIME)
def _saliency_kernel(
    cond: tl.tuple, uncond: tl.tuple, sigma_ptr: tl.tensor, strength: tl.tuple, memory_ptr: tl.tensor | None,
    momentum: tl.tuple, logits_ptr: tl.tensor, partials_ptr: tl.tensor, frames: tl.tensor, height: tl.tensor,
    width: tl.tensor, plane: tl.tensor, blur: tl.tensor, margin: tl.tensor, tile_height: tl.tensor,
    CHANNELS: tl.constexpr, AT_ONCE: tl.constexpr, SHARED: tl.constexpr, STEPS_H: tl.constexpr, STEPS_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, MARGIN_W: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    TILE_W: tl.constexpr,
) -> None:  # fmt: skip
    """The first of three launches; grid (tiles, models, samples)."""
    tile = tl.program_id(0)
    across = tl.cdiv(width, TILE_W)
    _measure(
        tl.program_id(1), tl.program_id(2), tl.num_programs(2), tile, tl.num_programs(0),
        tile // across * tile_height, tile % across * TILE_W,
        cond, uncond, sigma_ptr, strength, memory_ptr, momentum, logits_ptr, partials_ptr,
        frames, height, width, plane, blur, margin, tile_height,
        CHANNELS, AT_ONCE, SHARED, STEPS_H, STEPS_W, STEP_H, STEP_W, MARGIN_W, BLOCK_H, BLOCK_W, TILE_W,
    )  # fmt: skip


@triton.jit
def _lead_kernel(logits_ptr: tl.tensor, leads_ptr: tl.tensor, plane: tl.tensor, LEAD_BLOCK: tl.constexpr) -> None:
    """The second of three launches; grid (blocks, experts, samples)."""
    _measure_lead(
        tl.program_id(1) + 1, tl.program_id(2), tl.num_programs(2), tl.program_id(0), tl.num_programs(0),
        logits_ptr, leads_ptr, plane, LEAD_BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def _select_kernel(
    cond: tl.tuple, uncond: tl.tuple, bias: tl.tuple, region: tl.tuple, steps_b: tl.tuple, steps_t: tl.tuple,
    steps_y: tl.tuple, steps_x: tl.tuple, gain: tl.tuple, logits_ptr: tl.tensor, partials_ptr: tl.tensor,
    leads_ptr: tl.tensor, out_cond_ptr: tl.tensor, out_uncond_ptr: tl.tensor, weights_ptr: tl.tensor,
    partition_ptr: tl.tensor, spread_ptr: tl.tensor, frames: tl.tensor, width: tl.tensor, plane: tl.tensor,
    tiles: tl.tensor, lead_blocks: tl.tensor, softness: tl.tensor,
    CHANNELS: tl.constexpr, TILES: tl.constexpr, LEAD_BLOCKS: tl.constexpr, LEAD_BLOCK: tl.constexpr,
    SOFT: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr, SELECT_AT_ONCE: tl.constexpr,
) -> None:  # fmt: skip
    """The last of three launches; grid (blocks, samples).

    The blocks are processed in reverse order, because the data that was read last is still in the L2 cache.
    """
    _select(
        tl.num_programs(0) - 1 - tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1), tl.num_programs(1), tiles,
        cond, uncond, bias, region, steps_b, steps_t, steps_y, steps_x, gain, logits_ptr, partials_ptr, leads_ptr,
        out_cond_ptr, out_uncond_ptr, weights_ptr, partition_ptr, spread_ptr,
        frames, width, plane, lead_blocks, softness,
        CHANNELS, TILES, LEAD_BLOCKS, LEAD_BLOCK, SOFT, GROUPS, VECTOR, SELECT_AT_ONCE,
    )  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def _saliency_blend_kernel(
    cond: tl.tuple, uncond: tl.tuple, sigma_ptr: tl.tensor, strength: tl.tuple, memory_ptr: tl.tensor | None,
    momentum: tl.tuple, bias: tl.tuple, region: tl.tuple,
    steps_b: tl.tuple, steps_t: tl.tuple, steps_y: tl.tuple, steps_x: tl.tuple, gain: tl.tuple, logits_ptr: tl.tensor,
    partials_ptr: tl.tensor, leads_ptr: tl.tensor, out_cond_ptr: tl.tensor, out_uncond_ptr: tl.tensor,
    weights_ptr: tl.tensor, partition_ptr: tl.tensor, spread_ptr: tl.tensor, frames: tl.tensor, height: tl.tensor,
    width: tl.tensor, plane: tl.tensor, blur: tl.tensor, softness: tl.tensor,
    CHANNELS: tl.constexpr, AT_ONCE: tl.constexpr, SHARED: tl.constexpr, SOFT: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, LEAD_BLOCKS: tl.constexpr,
    LEAD_BLOCK: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
    SELECT_AT_ONCE: tl.constexpr,
) -> None:  # fmt: skip
    """The single launch for samples that fit one program; grid (samples,)."""
    sample, samples = tl.program_id(0), tl.num_programs(0)
    for model in range(len(cond)):
        _measure(
            model, sample, samples, 0, 1, 0, 0,
            cond, uncond, sigma_ptr, strength, memory_ptr, momentum, logits_ptr, partials_ptr,
            frames, height, width, plane, blur, 0, height,
            CHANNELS, AT_ONCE, SHARED,
            BLOCK_H // STEP_H, BLOCK_W // STEP_W, STEP_H, STEP_W, 0, BLOCK_H, BLOCK_W, BLOCK_W,
        )  # fmt: skip
    tl.debug_barrier()  # from here on, this program reads values that its other threads stored
    for expert in range(1, len(cond)):
        for block in range(LEAD_BLOCKS):
            _measure_lead(
                expert, sample, samples, block, LEAD_BLOCKS, logits_ptr, leads_ptr, plane, LEAD_BLOCK,
            )  # fmt: skip
    tl.debug_barrier()
    for block in range(BLOCKS):
        _select(
            block, sample, samples, 1,
            cond, uncond, bias, region, steps_b, steps_t, steps_y, steps_x, gain, logits_ptr, partials_ptr, leads_ptr,
            out_cond_ptr, out_uncond_ptr, weights_ptr, partition_ptr, spread_ptr,
            frames, width, plane, LEAD_BLOCKS, softness,
            CHANNELS, 1, LEAD_BLOCKS, LEAD_BLOCK, SOFT, GROUPS, VECTOR, SELECT_AT_ONCE,
        )  # fmt: skip


def _steps(region: Tensor | None, positions: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Strides of ``region`` along (b, t, y, x), with 0 for axes that are broadcast to ``positions`` (B, *S)."""
    if region is None:
        return 0, 0, 0, 0
    step_b, *step_t, step_y, step_x = region.expand(positions).stride()
    return step_b, step_t[0] if step_t else 0, step_y, step_x


# whether TRITON_INTERPRET=1 makes the kernels run in numpy on the CPU, for tests
INTERPRETED = not isinstance(_select_kernel, triton.JITFunction)


class _Tiling(NamedTuple):
    """Tiles of ``height`` x ``width`` positions, each read in a window of steps_h x steps_w blocks of 32 x 64."""

    height: int
    width: int
    steps_h: int
    steps_w: int
    margin_w: int  # a multiple of 8, so that windows start at aligned addresses


def _tiling(blur: int) -> _Tiling:
    steps_h, steps_w, margin_w = (1, 1, 8) if blur <= 17 else (2 if blur <= 33 else 3, 2, 32)
    return _Tiling(min(32, 32 * steps_h - blur // 2 * 2), 64 * steps_w - 2 * margin_w, steps_h, steps_w, margin_w)


def _outputs(like: Tensor, models: int, soft: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised tensors for all fields of ``Blend``, for predictions shaped as ``like`` [B, C, *S]."""
    batch, _, *axes = like.shape
    per_sample = ((models, batch * prod(axes[:-2])), torch.float32)
    logits = ((models, batch, *axes), torch.float32)
    weights = logits if soft else ((batch, *axes), torch.uint8)
    blended = (like.shape, like.dtype)
    out_cond, out_uncond, out_weights, out_partition, out_logits, out_spread = (
        torch.empty(shape, dtype=dtype, device=like.device)
        for shape, dtype in (blended, blended, weights, per_sample, logits, per_sample)
    )
    return out_cond, out_uncond, out_weights, out_partition, out_logits, out_spread


def _remembered(
    memory: Sequence[Tensor | None] | None, momentum: float, logits: Tensor
) -> tuple[Tensor | None, tuple[float, ...]]:
    """``memory`` of all models in one tensor of the shape of ``logits``, and the momentum of each model.

    The tensor is None, and every momentum 0, if no model has a memory.
    """
    if memory is None or all(m is None for m in memory):
        return None, (0.0,) * len(logits)
    nothing = torch.zeros(logits.shape[1:], device=logits.device)
    return (
        torch.stack([nothing if m is None else m.view(nothing.shape) for m in memory]),
        tuple(0.0 if m is None else momentum for m in memory),
    )


def _launch(
    cond: Sequence[Tensor],
    uncond: Sequence[Tensor],
    sigma: Tensor,
    strength: Sequence[float],
    bias: Sequence[float],
    region: Sequence[Tensor | None],
    gain: Sequence[float],
    quota: Sequence[Tensor | None] | None,
    memory: Sequence[Tensor | None] | None,
    momentum: float,
    blur: int,
    shared: bool,
    softness: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    like, models, soft = cond[0], len(cond), softness is not None
    batch, channels, *axes = like.shape
    height, width = axes[-2:]
    frames, plane = prod(axes[:-2]), height * width
    samples = batch * frames
    *blended, logits, spread = outputs = _outputs(like, models, soft)

    cond, uncond = (tuple(t.contiguous() for t in side) for side in (cond, uncond))
    strength, gain = (tuple(map(float, scalars)) for scalars in (strength, gain))

    block_h, block_w = (max(16, triton.next_power_of_2(n)) for n in (height, width))
    one = models <= ONE_PROGRAM_MODELS and max(block_h, block_w) <= 128 and block_h * block_w <= ONE_PROGRAM
    one &= quota is None
    tiling = _tiling(blur)
    tiles = 1 if one else triton.cdiv(height, tiling.height) * triton.cdiv(width, tiling.width)
    lead_blocks = triton.cdiv(plane, LEAD_BLOCK)
    partials, leads = (
        torch.empty((models, samples, n, k), dtype=torch.float32, device=like.device)
        for n, k in ((tiles, 4), (lead_blocks, 2))
    )

    vector = 16 // like.dtype.itemsize  # positions in one load of 16 bytes
    measure = (cond, uncond, sigma.contiguous(), strength, *_remembered(memory, momentum, logits))

    def decide(bias: Sequence[float], region: Sequence[Tensor | None]) -> tuple:
        steps = tuple(zip(*(_steps(r, (batch, *axes)) for r in region), strict=True))
        biases = tuple(map(float, bias))
        return (biases, tuple(region), *steps, gain, logits, partials, leads, *blended, spread)

    softness = softness if soft else 1.0
    # Channels loaded at once, to hide the latency of memory. Fewer are loaded if each needs more registers and code.
    at_once = 4 if width % 16 == 0 and not shared else 2
    options = {
        "CHANNELS": channels,
        "LEAD_BLOCK": LEAD_BLOCK,
        "VECTOR": vector,
        "SELECT_AT_ONCE": gcd(channels, 4 if models <= 2 and not (soft or one) else 2 if models <= 4 else 1),
        "num_stages": 1,
    }
    with torch.cuda.device_of(like):
        if one:
            warps = min(16 if models <= 2 else 8, block_h * block_w // 256)
            _saliency_blend_kernel[(samples,)](
                *measure, *decide(bias, region), frames, height, width, plane, blur, softness,
                AT_ONCE=at_once, SHARED=shared, SOFT=soft, BLOCK_H=block_h, BLOCK_W=block_w,
                STEP_H=16 if block_h > 64 else min(32, block_h), STEP_W=min(64, block_w), LEAD_BLOCKS=lead_blocks,
                BLOCKS=triton.cdiv(plane, 32 * warps * vector), GROUPS=32 * warps, num_warps=warps,
                maxnreg=min(255, 2048 // warps), **options,
            )  # fmt: skip
            return outputs
        _saliency_kernel[(tiles, models, samples)](
            *measure, logits, partials, frames, height, width, plane, blur, blur // 2, tiling.height,
            CHANNELS=channels, AT_ONCE=at_once, SHARED=shared, STEPS_H=tiling.steps_h, STEPS_W=tiling.steps_w,
            STEP_H=32, STEP_W=64, MARGIN_W=tiling.margin_w, BLOCK_H=32, BLOCK_W=64, TILE_W=tiling.width,
            num_warps=8, num_stages=1,
        )  # fmt: skip
        if quota is not None:
            leading, _, spreads = scores_of(logits)
            bias, region = assign_quotas(quota, bias, region, leading, spreads, not soft)
        if models > 1:
            _lead_kernel[(lead_blocks, models - 1, samples)](logits, leads, plane, LEAD_BLOCK=LEAD_BLOCK, num_warps=4)
        _select_kernel[(triton.cdiv(plane, 128 * vector), samples)](
            cond, uncond, *decide(bias, region), frames, width, plane, tiles, lead_blocks, softness,
            SOFT=soft, TILES=triton.next_power_of_2(tiles), LEAD_BLOCKS=triton.next_power_of_2(lead_blocks),
            GROUPS=128, num_warps=4, **options,
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
    quota: Sequence[Tensor | None] | None,
    memory: Sequence[Tensor | None] | None,
    momentum: float,
    blur: int,
    shared: bool,
    softness: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the shapes and dtypes of ``_launch``, for torch.compile."""
    return _outputs(cond[0], len(cond), softness is not None)


def _register() -> None:
    """Register the operator ``torch.ops.chorus.saliency_blend``, which torch.compile does not trace into."""
    if hasattr(torch.ops.chorus, "saliency_blend"):
        return  # registered when the pack was imported under another name
    operator = torch.library.custom_op(
        "chorus::saliency_blend",
        _launch,
        mutates_args=(),
        schema="(Tensor[] cond, Tensor[] uncond, Tensor sigma, float[] strength, float[] bias, Tensor?[] region,"
        " float[] gain, Tensor?[]? quota, Tensor?[]? memory, float momentum, int blur, bool shared, float? softness)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    quota: Sequence[Tensor | int | None] | None = None,
    memory: Sequence[Tensor | None] | None = None,
    momentum: float = 0.0,
    blur: int,
    shared: bool,
    softness: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``kernels.saliency_blend.saliency_blend``."""
    # in eager mode, the dispatch of the operator would take longer than the launches
    run = torch.ops.chorus.saliency_blend if torch.compiler.is_compiling() else _launch
    if quota is not None:  # the operator accepts only tensors
        samples = len(sigma) * prod(cond[0].shape[2:-2])
        quota = [torch.full((samples,), q, device=sigma.device) if isinstance(q, int) else q for q in quota]
    return run(cond, uncond, sigma, strength, bias, region, gain, quota, memory, momentum, blur, shared, softness)
