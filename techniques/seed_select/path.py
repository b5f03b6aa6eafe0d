"""Paths between noises, and centroids of noises, that have norms that are likely for random noise.

From Norm-guided latent space exploration for text-to-image generation (NAO, arXiv 2306.08687), which calls the given
noises seeds. A straight line between two seeds passes through noises with improbably small norms, from which models
generate grey images. NAO bends the line to minimise its length, weighted by how unlikely the norms on it are.

Objective, penalty and constants are those of the authors' code (dvirsamuel/SeedSelect, 8a1f3d4). Their code optimises
all numbers of a path (n points of d numbers), while this module minimises the same objective over the coordinates in
the span of the seeds. Norms and distances are the same in these coordinates, and so is the minimum. The cost does not
grow with the size of the noise, and the authors' random offset from the line is not needed.

Shapes: K seeds of d numbers, n points of a path including both ends, k coordinates in the span of the seeds.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .prior import check_noise, log_chi, onto_shell

LEARNING_RATE = 0.01  # learning rate of the authors' Adam, for each of the d numbers of a point
MAX_COSINE = 0.9995  # for a larger cosine of two seeds, lerp replaces slerp


def path_length(points: Tensor, d: int) -> Tensor:
    """−J = −Σ_i ‖x_i − x_{i+1}‖ log K(‖x_i + x_{i+1}‖ / 2): length of a path, weighted by how unlikely its norms are.

    log K is ``log_chi``. ``points`` [..., n, k] are the coordinates x_i of noises of d numbers; the result has the
    shape [...].
    """
    steps, middles = points[..., 1:, :] - points[..., :-1, :], (points[..., 1:, :] + points[..., :-1, :]) / 2
    return -(steps.norm(dim=-1) * log_chi(middles.norm(dim=-1), d)).sum(-1)


def gap_penalty(points: Tensor, gap: float) -> Tensor:
    """P = Σ_i relu(‖x_i − x_{i+1}‖ − ε): penalty for neighbours further apart than ε = ``gap``.

    ``points`` [..., n, k] are the coordinates x_i; the result has the shape [...].
    """
    return torch.relu((points[..., 1:, :] - points[..., :-1, :]).norm(dim=-1) - gap).sum(-1)


def centroid_loss(paths: Tensor, d: int, gap: float) -> Tensor:
    """−Σ_k J_k − log K(‖c‖) + Σ_k P_k for ``paths`` [K, n, k] from a centroid c to K seeds.

    All paths begin with c.
    """
    return (path_length(paths, d) + gap_penalty(paths, gap)).sum() - log_chi(paths[0, 0].norm(), d)


@dataclass(frozen=True, eq=False)
class SeedPath:
    """A path from seed ``a`` to seed ``b``, both [1, C, *S]."""

    a: Tensor
    b: Tensor
    points: Tensor  # [n, k] coordinates
    basis: Tensor  # [d, k] orthonormal

    def at(self, share: float, width: float = 3.0) -> Tensor:
        """Noise [1, C, *S] at ``share`` of the path length; 0 returns seed ``a`` and 1 seed ``b``, bit for bit.

        Between the ends, the norm is clamped to the shell of ``width`` (see ``chi_shell``). Inverted noises, and
        the points between them, can lie outside the shell. Models are not trained on such norms.
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share {share:g} of a path is not between 0 and 1; use 0.5 for the middle of the path")
        if share in (0.0, 1.0):
            return self.a if share == 0.0 else self.b
        length = torch.cat([torch.zeros(1).double(), (self.points[1:] - self.points[:-1]).norm(dim=1).cumsum(0)])
        target = share * length[-1]
        i = int(torch.searchsorted(length, target).clamp(1, len(length) - 1))
        between = (target - length[i - 1]) / (length[i] - length[i - 1]).clamp(min=1e-12)
        point = torch.lerp(self.points[i - 1], self.points[i], between)
        return onto_shell((self.basis @ point).view(self.a.shape).to(self.a), width)


@torch.inference_mode(False)
def norm_aware_path(a: Tensor, b: Tensor, *, points: int = 50, iterations: int = 2000) -> SeedPath:
    """Path between seeds ``a`` and ``b`` [1, C, *S] that minimises −J + P with ε = 2 ‖a − b‖ / n.

    −J is ``path_length`` and P is ``gap_penalty``. This is NAO's norm-aware interpolation. Adam starts from the
    straight line, and stops when the loss has changed by less than 0.001 ten times in a row.
    """
    _check_points(points)
    ends, basis = _in_their_span([a, b])
    gap = 2 * float((ends[0] - ends[1]).norm()) / points
    line = torch.lerp(ends[0], ends[1], _shares(points))

    def loss(inner: Tensor) -> Tensor:
        path = torch.cat([ends[:1], inner, ends[1:]])
        return path_length(path, a.numel()) + gap_penalty(path, gap)

    (inner,) = _minimise(loss, [line[1:-1]], a.numel(), iterations, tolerance=0.001, patience=10)
    return SeedPath(a, b, torch.cat([ends[:1], inner, ends[1:]]), basis)


@torch.inference_mode(False)
def norm_aware_centroid(
    seeds: Sequence[Tensor], *, points: int = 50, iterations: int = 2000
) -> tuple[Tensor, list[SeedPath]]:
    """Centroid c [1, C, *S] of at least two seeds, and its path to each seed.

    Minimises ``centroid_loss`` over c and all paths, with ε = 2 / n times the mean distance between two seeds. The initial
    c is the slerp midpoint of two seeds, or the mean of three or more. Adam stops when the loss has changed by less than
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
        lambda *x: centroid_loss(joined(*x), d, gap), [start, lines[:, 1:-1]], d, iterations, tolerance=0.01, patience=5
    )
    centroid = (basis @ c).view(seeds[0].shape).to(seeds[0])
    return centroid, [SeedPath(centroid, seed, path, basis) for seed, path in zip(seeds, joined(c, inner))]


def _shares(points: int) -> Tensor:
    return torch.linspace(0, 1, points, dtype=torch.float64)[:, None]


def _check_points(points: int) -> None:
    if points < 3:
        raise ValueError(
            f"{points} points are too few for a path between two seeds; use at least 3, the authors use 50"
        )


def _in_their_span(seeds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Coordinates [K, K] of the seeds in an orthonormal basis [d, K] of their span, and this basis; float64 on the CPU."""
    if len(seeds) < 2:
        raise ValueError(
            f"expected at least 2 noises for a path or centroid, got {len(seeds)}; use 2 or more references"
        )
    for seed in seeds:
        check_noise(seed)
        if seed.shape != seeds[0].shape:
            raise ValueError(
                f"the noises have different sizes, {list(seeds[0].shape)} and {list(seed.shape)}; use one image size"
            )
    flat = torch.stack([seed.detach().cpu().double().flatten() for seed in seeds])
    unit = flat / flat.norm(dim=1, keepdim=True)
    cosine, (i, j) = min((float(unit[i] @ unit[j]), (i, j)) for i, j in itertools.combinations(range(len(seeds)), 2))
    if not cosine > -MAX_COSINE:
        raise ValueError(
            f"noises {i + 1} and {j + 1} are opposite (cosine {cosine:.4f}), so there is no unique shortest path between"
            " them; use other seeds or references"
        )
    basis, coordinates = torch.linalg.qr(flat.T)
    return coordinates.T, basis


def _first_centroid(ends: Tensor) -> Tensor:
    """Initial centroid [k]: slerp(0.5) of two seeds, or the mean of nearly parallel seeds or of more than two."""
    mean = ends.mean(0)
    if len(ends) > 2:
        if float(mean.norm()) < 0.01 * float(ends.norm(dim=1).mean()):
            raise ValueError(
                "the mean of the noises is almost 0, so there is no unique centroid; leave one reference out"
            )
        return mean
    cosine = (ends[0] @ ends[1]) / (ends[0].norm() * ends[1].norm())
    if float(cosine) > MAX_COSINE:
        return mean
    theta = torch.acos(cosine)
    return torch.sin(theta / 2) / torch.sin(theta) * (ends[0] + ends[1])


@torch.enable_grad()
def _minimise(
    loss_of: Callable[..., Tensor],
    starts: Sequence[Tensor],
    d: int,
    iterations: int,
    *,
    tolerance: float,
    patience: int,
) -> list[Tensor]:
    """Best iterate of Adam from ``starts``.

    Adam stops when the loss has changed by less than ``tolerance`` for ``patience`` iterations in a row.
    """
    # Adam moves each number by about the learning rate; with this factor a point of k coordinates moves as far as a
    # point of d coordinates
    rate = LEARNING_RATE * (d / starts[0].shape[-1]) ** 0.5
    x = [start.clone().requires_grad_(True) for start in starts]
    adam = torch.optim.Adam(x, lr=rate)
    best, best_loss, last, unchanged = [v.detach().clone() for v in x], torch.inf, torch.inf, 0
    for _ in range(iterations):
        adam.zero_grad()
        loss = loss_of(*x)
        value = float(loss.detach())
        if value < best_loss:
            best, best_loss = [v.detach().clone() for v in x], value
        unchanged = unchanged + 1 if abs(last - value) < tolerance else 0
        if unchanged == patience:
            break
        last = value
        loss.backward()
        adam.step()
    return best
