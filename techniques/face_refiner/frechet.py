"""Fréchet distance of two sets of features, with a confidence interval.

FD = |μa − μb|² + tr(Σa + Σb − 2 (Σa^½ Σb Σa^½)^½). μ and Σ are the mean and the covariance of a set. FID (arXiv
1706.08500) is this distance for one kind of features; here the features are arbitrary. For finite sets FD is too large
on average, by about c / N for a constant c, even if both sets are from the same distribution. Therefore compare only
values with equal N, M and features, or values without this bias (``Frechet.corrected``). arXiv 1911.07023 removes the
bias by extrapolation instead.

The interval is computed by a jackknife over blocks of rows. The bootstrap does not work here: its duplicate rows make
every set less diverse, which increases the distance by as much as the bias itself. The jackknife computes the
distance again without each block in turn, and uses only the differences of these distances. On average it does not
underestimate the variance (Efron and Stein 1981).

Shapes: N and M rows, D features.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

BLOCKS = 50  # relative error of the interval's width: about 1 / √(2 · BLOCKS)


class Frechet(NamedTuple):
    """A distance, or the difference of two distances, with its confidence interval.

    ``corrected`` is ``value`` without the 1 / N part of the bias. It is reliable if N and M are well above D. It may be
    negative, or outside the interval from ``low`` to ``high``. Its confidence interval has the same width.
    """

    value: float
    low: float  # lower limit of the 95 % confidence interval of the mean of ``value`` over sets of these sizes
    high: float  # upper limit of this interval
    corrected: float


class _Moments(NamedTuple):
    mean: Tensor  # [D]
    covariance: Tensor  # [D, D]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """FD of ``a`` [N, D] and ``b`` [M, D], in the square of the features' unit; 0 for equal sets.

    Raises a ValueError for wrong shapes, fewer than 2 rows, or non-finite values.
    """
    one, other = (_moments(x) for x in _features(a, b))
    return max(0.0, _distance(one, other, _root(one.covariance)))


def frechet(
    a: Tensor, b: Tensor, generator: torch.Generator, block_count: int = BLOCKS, paired: bool = False
) -> Frechet:
    """FD of ``a`` [N, D] and ``b`` [M, D] with its interval and bias correction.

    generator  on the CPU; assigns the rows to blocks
    block_count  number of blocks, at most N and M; for each block, one distance is computed without its rows
    paired     rows i of a and b belong together (same prompt and seed) and are left out together
    """
    a, b = _features(a, b)
    one = _Jackknife(a, b, *_blocks(a, b, generator, block_count, paired))
    return _estimate_distance(one.value, one.left_out())


def frechet_difference(
    a1: Tensor, a2: Tensor, b: Tensor, generator: torch.Generator, block_count: int = BLOCKS, paired: bool = False
) -> Frechet:
    """The difference FD(a1, b) − FD(a2, b). Rows i of ``a1`` and ``a2`` [N, D] belong together.

    If ``paired``, row i of ``b`` belongs to them too.

    Errors common to both distances cancel, including most of the bias. The interval is therefore far narrower than that
    of either distance.
    """
    return frechet_both(a1, a2, b, generator, block_count, paired)[2]


def frechet_both(
    a1: Tensor, a2: Tensor, b: Tensor, generator: torch.Generator, block_count: int = BLOCKS, paired: bool = False
) -> tuple[Frechet, Frechet, Frechet]:
    """FD(a1, b), FD(a2, b), and their difference as in ``frechet_difference``."""
    if len(a1) != len(a2):
        raise ValueError(
            f"{len(a1)} and {len(a2)} rows cannot be paired; pass the same number of rows, in the same order"
        )
    a1, a2, b = _features(a1, a2, b)
    blocks = _blocks(a1, b, generator, block_count, paired)
    one, two = _Jackknife(a1, b, *blocks), _Jackknife(a2, b, *blocks)
    left_out = one.left_out(), two.left_out()
    difference = _estimate(one.value - two.value, [x - y for x, y in zip(*left_out)])
    return _estimate_distance(one.value, left_out[0]), _estimate_distance(two.value, left_out[1]), difference


def _features(*sets: Tensor) -> list[Tensor]:
    """The sets in float64 on the CPU, projected to the dimensions that they span together."""
    width = sets[0].shape[-1]
    for x in sets:
        if x.ndim != 2 or x.shape[1] != width:
            shapes = ", ".join(str(tuple(x.shape)) for x in sets)
            raise ValueError(f"features of shapes {shapes} cannot be compared; pass [N, D] with equal D")
        if len(x) < 2:
            raise ValueError(
                f"a set of {len(x)} row(s) has no covariance; pass at least 2 rows, preferably more than {width}"
            )
        if not bool(x.isfinite().all()):
            raise ValueError("the features are not finite (NaN or infinite); run the encoder in a wider dtype")
    result = [x.detach().to("cpu", torch.float64) for x in sets]
    # moving the origin does not change the distance, but it reduces the rounding error
    origin = result[0].mean(0)
    result = [x - origin for x in result]
    if sum(map(len, result)) < width:
        basis = torch.linalg.qr(torch.cat(result).mT).Q
        result = [x @ basis for x in result]
    return result


def _moments(x: Tensor) -> _Moments:
    return _Moments(x.mean(0), x.mT.cov())


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root; eigenvalues that rounding made negative become 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.mT


def _distance(a: _Moments, b: _Moments, root: Tensor) -> float:
    """FD of a and b. ``root``: square root of a's covariance.

    The arguments a and b may be swapped, because tr (√Σa Σb √Σa)^½ is symmetric in a and b.
    """
    shared = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * shared
    return float((a.mean - b.mean).square().sum() + spread)


def _blocks(
    a: Tensor, b: Tensor, generator: torch.Generator, block_count: int, paired: bool
) -> tuple[Tensor, Tensor | None]:
    """The block of every row of a and of b, 0 to ``block_count`` − 1; None for b if a and b share their blocks."""
    if paired and len(a) != len(b):
        raise ValueError(
            f"{len(a)} and {len(b)} rows cannot be paired; pass the same number of rows, in the same order, or set"
            " paired to False"
        )
    block_count = min(block_count, len(a), len(b))
    if block_count < 3:
        raise ValueError(
            f"{block_count} blocks are too few for an interval; use at least 3 blocks, and at least 3 rows in each set"
        )
    assigned = [torch.randperm(len(x), generator=generator) % block_count for x in (a, b)]
    return assigned[0], None if paired else assigned[1]


class _Jackknife:
    """FD of two sets, and the FDs without each block of rows in turn."""

    def __init__(self, a: Tensor, b: Tensor, a_blocks: Tensor, b_blocks: Tensor | None) -> None:
        self.a, self.b, self.a_blocks, self.b_blocks = a, b, a_blocks, b_blocks
        self.a_moments, self.b_moments = _moments(a), _moments(b)
        self.a_root = _root(self.a_moments.covariance)
        self.value = _distance(self.a_moments, self.b_moments, self.a_root)

    def left_out(self) -> list[Tensor]:
        """Distances [blocks], each computed without one block of rows.

        If a and b share the blocks, the list has one tensor. Otherwise it has two: the distances without each block
        of a, and the distances without each block of b.
        """
        if self.b_blocks is None:
            pairs = zip(_without(self.a, self.a_blocks), _without(self.b, self.a_blocks))
            return [torch.tensor([_distance(a, b, _root(a.covariance)) for a, b in pairs])]
        b_root = _root(self.b_moments.covariance)
        of_a = [_distance(self.b_moments, a, b_root) for a in _without(self.a, self.a_blocks)]
        of_b = [_distance(self.a_moments, b, self.a_root) for b in _without(self.b, self.b_blocks)]
        return [torch.tensor(of_a), torch.tensor(of_b)]


def _without(x: Tensor, blocks: Tensor) -> Iterator[_Moments]:
    """The moments of ``x`` without each block in turn, from the sums over all rows minus those over the block."""
    center = x.mean(0)
    x = x - center
    products = x.mT @ x
    for k in range(int(blocks.max()) + 1):
        out = x[blocks == k]
        left = len(x) - len(out)
        moved = -out.sum(0) / left
        yield _Moments(center + moved, (products - out.mT @ out - left * moved.outer(moved)) / (left - 1))


def _estimate(value: float, left_out: list[Tensor]) -> Frechet:
    """Jackknife estimate. ``left_out``: the distances that ``_Jackknife.left_out`` returns.

    The variances and biases of the list's entries are added, because the two sets are independent.
    """
    variance = bias = 0.0
    for distances in left_out:
        blocks = len(distances)
        mean = distances.mean()
        variance += float((distances - mean).square().sum()) * (blocks - 1) / blocks
        bias += (blocks - 1) * (float(mean) - value)
    half = float(student.ppf(0.975, blocks - 1)) * math.sqrt(variance)
    return Frechet(value, value - half, value + half, value - bias)


def _estimate_distance(value: float, left_out: list[Tensor]) -> Frechet:
    """``_estimate`` of a distance; its value and lower limit are at least 0."""
    result = _estimate(value, left_out)
    return result._replace(value=max(0.0, result.value), low=max(0.0, result.low))
