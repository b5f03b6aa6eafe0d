"""Fréchet distance of two sets of features, and how far to trust it.

FD = |μa − μb|² + tr(Σa + Σb − 2 (Σa^½ Σb Σa^½)^½) of the Gaussians that fit the sets (FID, arXiv 1706.08500, without its
choice of features). From finite sets it is too large on average, by about c / N, however alike the sets are: compare
numbers of the same N, M and features, or those without that bias (``Frechet.corrected``; arXiv 1911.07023 has the like by
extrapolation).

The interval is by the jackknife over blocks of rows. The bootstrap is no use here: rows drawn twice make every set poorer
than it is and shift the distance upward by as much as the bias itself. A jackknife leaves rows out and looks only at how
the results differ, and on average its variance is not too small (Efron and Stein 1981).

Shapes: N and M rows, D features.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

BLOCKS = 50  # the interval's own accuracy: its width is right to about 1 / √(2 · BLOCKS)


class Frechet(NamedTuple):
    value: float  # the distance of the sets, or the difference of two
    low: float  # 95 % interval of what other sets of these sizes would give on average
    high: float
    corrected: float  # without the part of the bias that falls as 1 / N, good where N and M are well above D; may be
    # below 0 and outside of the interval, whose width is its own too


class _Moments(NamedTuple):
    mean: Tensor  # [D]
    covariance: Tensor  # [D, D]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """FD of ``a`` [N, D] and ``b`` [M, D], in the square of the features' unit; 0 for equal sets.

    ValueError: other shapes, fewer than 2 rows, numbers that are none.
    """
    one, other = (_moments(x) for x in _features(a, b))
    return max(0.0, _distance(one, other, _root(one.covariance)))


def frechet(a: Tensor, b: Tensor, generator: torch.Generator, draws: int = BLOCKS, paired: bool = False) -> Frechet:
    """FD of ``a`` [N, D] and ``b`` [M, D] with its interval and without its bias.

    generator  of the CPU; deals the rows into blocks
    draws      blocks; as many distances are computed for each set. At most N and M
    paired     row i of a and of b belong together (one prompt, one seed), and are left out together
    """
    a, b = _features(a, b)
    one = _Jackknife(a, b, *_blocks(a, b, generator, draws, paired))
    return _distance_of(one.value, one.left_out())


def frechet_difference(
    a1: Tensor, a2: Tensor, b: Tensor, generator: torch.Generator, draws: int = BLOCKS, paired: bool = False
) -> Frechet:
    """FD(a1, b) − FD(a2, b), where row i of ``a1`` and of ``a2`` [N, D] belong together; ``paired``: and row i of ``b``.

    What the two have in common, most of the bias too, falls away, so that this is far more certain than either.
    """
    return frechet_both(a1, a2, b, generator, draws, paired)[2]


def frechet_both(
    a1: Tensor, a2: Tensor, b: Tensor, generator: torch.Generator, draws: int = BLOCKS, paired: bool = False
) -> tuple[Frechet, Frechet, Frechet]:
    """FD(a1, b), FD(a2, b), and their difference as ``frechet_difference`` has it."""
    if len(a1) != len(a2):
        raise ValueError(f"{len(a1)} and {len(a2)} rows are no pairs; give both sets in the same order and number")
    a1, a2, b = _features(a1, a2, b)
    blocks = _blocks(a1, b, generator, draws, paired)
    one, two = _Jackknife(a1, b, *blocks), _Jackknife(a2, b, *blocks)
    left_out = one.left_out(), two.left_out()
    difference = _estimate(one.value - two.value, [x - y for x, y in zip(*left_out)])
    return _distance_of(one.value, left_out[0]), _distance_of(two.value, left_out[1]), difference


def _features(*sets: Tensor) -> list[Tensor]:
    """The sets in float64 on the CPU, in no more dimensions than they fill together."""
    width = sets[0].shape[-1]
    for x in sets:
        if x.ndim != 2 or x.shape[1] != width:
            shapes = ", ".join(str(tuple(x.shape)) for x in sets)
            raise ValueError(f"features of the shapes {shapes} cannot be compared; give [N, D] with one D")
        if len(x) < 2:
            raise ValueError(f"a set of {len(x)} has no covariance; give at least 2 rows, better more than {width}")
        if not bool(x.isfinite().all()):
            raise ValueError("features hold numbers that are NaN or infinite; run the encoder in a wider dtype")
    found = [x.detach().to("cpu", torch.float64) for x in sets]
    # distances do not depend on where the origin is, and rounding does
    origin = found[0].mean(0)
    found = [x - origin for x in found]
    if sum(map(len, found)) < width:
        basis = torch.linalg.qr(torch.cat(found).mT).Q
        found = [x @ basis for x in found]
    return found


def _moments(x: Tensor) -> _Moments:
    return _Moments(x.mean(0), x.mT.cov())


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root; what rounding made negative of a missing rank is 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.mT


def _distance(a: _Moments, b: _Moments, root: Tensor) -> float:
    """``root``: of a's covariance. tr (√Σa Σb √Σa)^½ is the same either way round."""
    shared = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * shared
    return float((a.mean - b.mean).square().sum() + spread)


def _blocks(a: Tensor, b: Tensor, generator: torch.Generator, draws: int, paired: bool) -> tuple[Tensor, Tensor | None]:
    """The block of every row, 0 to ``draws`` − 1; for b None where it is a's."""
    if paired and len(a) != len(b):
        raise ValueError(
            f"{len(a)} and {len(b)} rows are no pairs; give both in the same order, or set paired to False"
        )
    draws = min(draws, len(a), len(b))
    if draws < 3:
        raise ValueError(f"{draws} blocks give no interval; use at least 3 draws, and 3 rows in each set")
    dealt = [torch.randperm(len(x), generator=generator) % draws for x in (a, b)]
    return dealt[0], None if paired else dealt[1]


class _Jackknife:
    """FD of two sets with one block of rows left out after the other."""

    def __init__(self, a: Tensor, b: Tensor, a_blocks: Tensor, b_blocks: Tensor | None) -> None:
        self.a, self.b, self.a_blocks, self.b_blocks = a, b, a_blocks, b_blocks
        self.a_moments, self.b_moments = _moments(a), _moments(b)
        self.a_root = _root(self.a_moments.covariance)
        self.value = _distance(self.a_moments, self.b_moments, self.a_root)

    def left_out(self) -> list[Tensor]:
        """Distances [blocks] without each block: of pairs, or first of a and then of b."""
        if self.b_blocks is None:
            pairs = zip(_without(self.a, self.a_blocks), _without(self.b, self.a_blocks))
            return [torch.tensor([_distance(a, b, _root(a.covariance)) for a, b in pairs])]
        b_root = _root(self.b_moments.covariance)
        of_a = [_distance(self.b_moments, a, b_root) for a in _without(self.a, self.a_blocks)]
        of_b = [_distance(self.a_moments, b, self.a_root) for b in _without(self.b, self.b_blocks)]
        return [torch.tensor(of_a), torch.tensor(of_b)]


def _without(x: Tensor, blocks: Tensor) -> Iterator[_Moments]:
    """The moments of the rows of ``x`` without each block, from those of all and the block's own."""
    center = x.mean(0)
    x = x - center
    products = x.mT @ x
    for k in range(int(blocks.max()) + 1):
        out = x[blocks == k]
        left = len(x) - len(out)
        moved = -out.sum(0) / left
        yield _Moments(center + moved, (products - out.mT @ out - left * moved.outer(moved)) / (left - 1))


def _estimate(value: float, left_out: list[Tensor]) -> Frechet:
    """Independent sources of error, each with its blocks, add their variances and biases."""
    variance = bias = 0.0
    for found in left_out:
        blocks = len(found)
        mean = found.mean()
        variance += float((found - mean).square().sum()) * (blocks - 1) / blocks
        bias += (blocks - 1) * (float(mean) - value)
    half = float(student.ppf(0.975, blocks - 1)) * math.sqrt(variance)
    return Frechet(value, value - half, value + half, value - bias)


def _distance_of(value: float, left_out: list[Tensor]) -> Frechet:
    """As ``_estimate``, of what is never negative."""
    found = _estimate(value, left_out)
    return found._replace(value=max(0.0, found.value), low=max(0.0, found.low))
