"""Paths and centroids of seeds that stay where noise is likely.

Norm-guided latent space exploration for text-to-image generation (NAO, arXiv 2306.08687). A straight line between two
noises passes norms that no noise has, and the model answers with a grey picture; NAO bends the line so that its length,
weighted by how unlikely its norms are, is least. Objective, penalty and numbers are those of the authors' code
(dvirsamuel/SeedSelect, 8a1f3d4), which optimises all n d numbers of a path. Here the same objective is minimised in the
plane of its seeds (their span, for a centroid): norms, distances and so the minimum are the same, a noise of 16,384
numbers costs as much as one of two, and the authors' random nudge off the line is not needed.

Shapes: K seeds of d numbers, n points of a path with both ends, k coordinates in the span of the seeds.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .prior import check_noise, log_chi, onto_shell

LEARNING_RATE = 0.01  # of the authors' Adam, for each of d numbers
MAX_COSINE = 0.9995  # of two seeds, above which slerp is lerp


def path_length(points: Tensor, d: int) -> Tensor:
    """−J = −Σ_i ‖x_i − x_{i+1}‖ log K(‖x_i + x_{i+1}‖ / 2) [...] of points [..., n, k] for noises of d numbers."""
    steps, middles = points[..., 1:, :] - points[..., :-1, :], (points[..., 1:, :] + points[..., :-1, :]) / 2
    return -(steps.norm(dim=-1) * log_chi(middles.norm(dim=-1), d)).sum(-1)


def gap_penalty(points: Tensor, gap: float) -> Tensor:
    """P = Σ_i relu(‖x_i − x_{i+1}‖ − ε) [...] of points [..., n, k], ε = ``gap``."""
    return torch.relu((points[..., 1:, :] - points[..., :-1, :]).norm(dim=-1) - gap).sum(-1)


def centroid_loss(paths: Tensor, d: int, gap: float) -> Tensor:
    """−Σ_k J_k − log K(‖c‖) + Σ_k P_k of the paths [K, n, k] from a centroid c, their common first point, to K seeds."""
    return (path_length(paths, d) + gap_penalty(paths, gap)).sum() - log_chi(paths[0, 0].norm(), d)


@dataclass(frozen=True, eq=False)
class SeedPath:
    """A path from seed ``a`` to seed ``b``, both [1, C, *S]."""

    a: Tensor
    b: Tensor
    points: Tensor  # [n, k] coordinates
    basis: Tensor  # [d, k] orthonormal

    def at(self, share: float, width: float = 3.0) -> Tensor:
        """The noise [1, C, *S] at ``share`` of the way, 0 to 1, by distance; the ends bit for bit.

        In between, the norm is held in the shell of ``width``: seeds from inversions can lie outside, and the few
        points that lead in from there stand where no model was trained.
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share {share:g} of a path is not in 0 to 1")
        if share in (0.0, 1.0):
            return self.a if share == 0.0 else self.b
        gone = torch.cat([torch.zeros(1).double(), (self.points[1:] - self.points[:-1]).norm(dim=1).cumsum(0)])
        target = share * gone[-1]
        i = int(torch.searchsorted(gone, target).clamp(1, len(gone) - 1))
        between = (target - gone[i - 1]) / (gone[i] - gone[i - 1]).clamp(min=1e-12)
        point = torch.lerp(self.points[i - 1], self.points[i], between)
        return onto_shell((self.basis @ point).view(self.a.shape).to(self.a), width)


@torch.inference_mode(False)
def norm_aware_path(a: Tensor, b: Tensor, *, points: int = 50, iterations: int = 2000) -> SeedPath:
    """The path between seeds [1, C, *S] that minimises −J + P (norm-aware interpolation), ε = 2 ‖a − b‖ / n.

    Adam from the straight line; it ends where the loss changes by less than 0.001 ten times in a row.
    """
    _check_points(points)
    ends, basis = _in_their_span([a, b])
    gap = 2 * float((ends[0] - ends[1]).norm()) / points
    line = torch.lerp(ends[0], ends[1], _shares(points))

    def loss(inner: Tensor) -> Tensor:
        path = torch.cat([ends[:1], inner, ends[1:]])
        return path_length(path, a.numel()) + gap_penalty(path, gap)

    (inner,) = _minimise(loss, [line[1:-1]], a.numel(), iterations, tolerance=0.001, calm=10)
    return SeedPath(a, b, torch.cat([ends[:1], inner, ends[1:]]), basis)


@torch.inference_mode(False)
def norm_aware_centroid(
    seeds: Sequence[Tensor], *, points: int = 50, iterations: int = 2000
) -> tuple[Tensor, list[SeedPath]]:
    """The centroid c [1, C, *S] of at least two seeds and its paths to each of them.

    It minimises ``centroid_loss`` over c and all paths, with ε = 2 / n times the mean distance of two seeds.
    c starts half way between two seeds by slerp, of more at their mean; the end is where the loss changes by less than
    0.01 five times in a row.
    """
    _check_points(points)
    ends, basis = _in_their_span(seeds)  # [K, k]
    d, start = seeds[0].numel(), _first_centroid(ends)
    pairs = [float((p - q).norm()) for p, q in itertools.combinations(ends, 2)]
    gap = 2 * sum(pairs) / len(pairs) / points
    lines = torch.lerp(start, ends[:, None], _shares(points))  # [K, n, k]

    def joined(c: Tensor, inner: Tensor) -> Tensor:
        return torch.cat([c.expand(len(ends), 1, -1), inner, ends[:, None]], dim=1)

    c, inner = _minimise(
        lambda *x: centroid_loss(joined(*x), d, gap), [start, lines[:, 1:-1]], d, iterations, tolerance=0.01, calm=5
    )
    centroid = (basis @ c).view(seeds[0].shape).to(seeds[0])
    return centroid, [SeedPath(centroid, seed, path, basis) for seed, path in zip(seeds, joined(c, inner))]


def _shares(points: int) -> Tensor:
    return torch.linspace(0, 1, points, dtype=torch.float64)[:, None]


def _check_points(points: int) -> None:
    if points < 3:
        raise ValueError(f"{points} points make no path between two seeds; use at least 3, the authors use 50")


def _in_their_span(seeds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Coordinates [K, K] of the seeds and the orthonormal basis [d, K] they belong to, float64 on the CPU."""
    if len(seeds) < 2:
        raise ValueError(f"{len(seeds)} seed has no path or centroid; give at least two, from two references")
    for seed in seeds:
        check_noise(seed)
        if seed.shape != seeds[0].shape:
            raise ValueError(
                f"seeds of size {list(seed.shape)} and {list(seeds[0].shape)} differ; use one picture size"
            )
    flat = torch.stack([seed.detach().cpu().double().flatten() for seed in seeds])
    unit = flat / flat.norm(dim=1, keepdim=True)
    cosine, (i, j) = min((float(unit[i] @ unit[j]), (i, j)) for i, j in itertools.combinations(range(len(seeds)), 2))
    if not cosine > -MAX_COSINE:
        raise ValueError(
            f"seeds {i + 1} and {j + 1} point away from each other (cosine {cosine:.4f}) and no path between them is"
            " shorter than others; use other seeds or references"
        )
    basis, coordinates = torch.linalg.qr(flat.T)
    return coordinates.T, basis


def _first_centroid(ends: Tensor) -> Tensor:
    """slerp(0.5) of two seeds, lerp of nearly parallel ones, the mean of more: [k]."""
    mean = ends.mean(0)
    if len(ends) > 2:
        if float(mean.norm()) < 0.01 * float(ends.norm(dim=1).mean()):
            raise ValueError("the seeds cancel to a mean of almost 0, from which no centroid is nearest; leave one out")
        return mean
    cosine = (ends[0] @ ends[1]) / (ends[0].norm() * ends[1].norm())
    if float(cosine) > MAX_COSINE:
        return mean
    theta = torch.acos(cosine)
    return torch.sin(theta / 2) / torch.sin(theta) * (ends[0] + ends[1])


@torch.enable_grad()
def _minimise(
    loss_of: Callable[..., Tensor], starts: Sequence[Tensor], d: int, iterations: int, *, tolerance: float, calm: int
) -> list[Tensor]:
    """The best iterate of Adam on all ``starts``; it ends early when the loss is ``calm`` times in a row calm."""
    # each of d numbers moves by the rate; so that a point moves as far, its k coordinates share what d would go
    rate = LEARNING_RATE * (d / starts[0].shape[-1]) ** 0.5
    x = [start.clone().requires_grad_(True) for start in starts]
    adam = torch.optim.Adam(x, lr=rate)
    best, best_loss, last, quiet = [v.detach().clone() for v in x], torch.inf, torch.inf, 0
    for _ in range(iterations):
        adam.zero_grad()
        loss = loss_of(*x)
        value = float(loss.detach())
        if value < best_loss:
            best, best_loss = [v.detach().clone() for v in x], value
        quiet = quiet + 1 if abs(last - value) < tolerance else 0
        if quiet == calm:
            break
        last = value
        loss.backward()
        adam.step()
    return best
