"""The χ prior of norms, and NAO's paths and centroids, compared with independent computations."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from chorus.techniques.seed_select.path import (
    centroid_loss,
    gap_penalty,
    norm_aware_centroid,
    norm_aware_path,
    path_length,
)
from chorus.techniques.seed_select.prior import check_noise, check_width, chi_shell, log_chi, onto_shell

pytestmark = pytest.mark.usefixtures("one_thread")


def seeds(count, shape=(1, 4, 8, 8), scale=1.0):
    g = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=g) * scale for _ in range(count)]


@pytest.mark.parametrize("d", [1, 2, 3, 16, 256, 16384, 65536])
def test_log_chi_is_the_log_density_of_a_norm(d):
    r = np.sqrt(d) + np.array([-0.7, -0.1, 0.3, 4.0])
    np.testing.assert_allclose(log_chi(torch.tensor(r), d).numpy(), stats.chi(d).logpdf(r), rtol=1e-9, atol=1e-7)


def test_log_chi_of_single_precision_norms_is_computed_in_double():
    r = torch.tensor(127.5)
    assert float(log_chi(r, 16384)) == pytest.approx(stats.chi(16384).logpdf(127.5), abs=1e-6)


@pytest.mark.parametrize("d", [16, 256, 16384])
@pytest.mark.parametrize("width", [1.0, 3.0])
def test_shell_includes_the_stated_share_of_norms(d, width):
    low, high = chi_shell(d, width)
    assert stats.chi(d).cdf(high) - stats.chi(d).cdf(low) == pytest.approx(math.erf(width / math.sqrt(2)), abs=0.005)
    assert (low + high) / 2 == pytest.approx(stats.chi(d).mean(), rel=1e-3)


def test_onto_shell_moves_only_outside_norms_to_the_nearest_border():
    (z,) = seeds(1)
    low, high = chi_shell(z.numel(), 3.0)
    for norm in (0.2 * low, low, high, 3 * high):
        scaled = z * (norm / z.norm())
        out = onto_shell(scaled, 3.0)
        assert float(out.norm()) == pytest.approx(min(max(norm, low), high), rel=1e-6)
        torch.testing.assert_close(out / out.norm(), z / z.norm())
    assert onto_shell(z, 3.0) is z
    assert onto_shell(z * 5, math.inf).equal(z * 5)


def test_invalid_width_and_noise_rejected():
    for width in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="is not above 0; use 3"):
            check_width(width)
    with pytest.raises(ValueError, match="noise of size 2x4x8x8 is not one sample"):
        check_noise(torch.zeros(2, 4, 8, 8))
    with pytest.raises(ValueError, match="noise is not finite"):
        check_noise(torch.full((1, 4, 8, 8), math.inf))


def path_length_by_loops(points, d):
    """−J computed with loops and scipy."""
    return -sum(
        math.dist(p, q) * stats.chi(d).logpdf(math.hypot(*[(u + v) / 2 for u, v in zip(p, q)]))
        for p, q in itertools.pairwise(points)
    )


def test_path_length_and_penalty_equal_their_definition():
    paths = torch.randn(3, 7, 20, dtype=torch.float64) * 1.3
    for ours, points in zip(path_length(paths, 20).tolist(), paths.tolist()):
        assert ours == pytest.approx(path_length_by_loops(points, 20), rel=1e-10)
    for ours, points in zip(gap_penalty(paths, 7.5).tolist(), paths.tolist()):
        gaps = [math.dist(p, q) for p, q in itertools.pairwise(points)]
        assert ours == pytest.approx(sum(max(0.0, g - 7.5) for g in gaps), rel=1e-12)
        assert 0 < sum(g > 7.5 for g in gaps) < len(gaps)


def centroid_loss_by_loops(paths, d, gap):
    """``centroid_loss`` computed with loops and scipy."""
    total = -stats.chi(d).logpdf(math.hypot(*paths[0][0].tolist()))
    for path in paths:
        gaps = [math.dist(p, q) for p, q in itertools.pairwise(path.tolist())]
        total += path_length_by_loops(path.tolist(), d) + sum(max(0.0, g - gap) for g in gaps)
    return total


def test_centroid_loss_equals_its_definition():
    paths = torch.randn(3, 7, 20, dtype=torch.float64)
    paths[:, 0] = paths[0, 0].clone() * 1.2
    assert float(centroid_loss(paths, 20, 6.0)) == pytest.approx(centroid_loss_by_loops(paths, 20, 6.0), rel=1e-10)


def test_path_length_gradient_equals_central_differences():
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: path_length(p, 6) + gap_penalty(p, 0.1), x.requires_grad_(True))


def objective_of_all_numbers(points, a, b, d):
    """−J + P of a path of ``points`` [n, d] from ``a`` to ``b``."""
    gap = 2 * float((a - b).double().norm()) / len(points)
    gaps = (points[1:] - points[:-1]).norm(dim=1)
    return path_length_by_loops(points.tolist(), d) + float(torch.relu(gaps - gap).sum())


def authors_path(a, b, d, n=50):
    """The authors' algorithm: Adam with rate 0.01 on all d numbers, starting from the line with random offsets."""
    g = torch.Generator().manual_seed(0)
    line = torch.lerp(a.double().flatten(), b.double().flatten(), torch.linspace(0, 1, n).double()[:, None])
    inner = (line + torch.rand(line.shape, generator=g) / 100)[1:-1].clone().requires_grad_(True)
    adam, gap = torch.optim.Adam([inner], lr=0.01), 2 * float((a - b).double().norm()) / n
    for _ in range(1500):
        adam.zero_grad()
        points = torch.cat([line[:1], inner, line[-1:]])
        steps = (points[1:] - points[:-1]).norm(dim=1)
        loss = -(steps * log_chi((points[1:] + points[:-1]).norm(dim=1) / 2, d)).sum() + torch.relu(steps - gap).sum()
        loss.backward()
        adam.step()
    return points.detach()


@pytest.mark.slow
def test_path_objective_matches_optimisation_of_all_numbers():
    a, b = seeds(2)
    d = a.numel()
    path = norm_aware_path(a, b)
    points = (path.points @ path.basis.T).double()
    ours = objective_of_all_numbers(points, a, b, d)
    theirs = objective_of_all_numbers(authors_path(a, b, d), a, b, d)
    line = torch.lerp(a.double().flatten(), b.double().flatten(), torch.linspace(0, 1, 50).double()[:, None])
    assert ours <= theirs * 1.01
    assert ours < 0.2 * objective_of_all_numbers(line, a, b, d)


def test_path_has_likely_norms_unlike_a_line():
    a, b = seeds(2)
    path = norm_aware_path(a, b)
    low, high = chi_shell(a.numel(), 3.0)
    norms = [float(path.at(k / 10).norm()) for k in range(11)]
    assert all(low - 1e-4 <= n <= high + 1e-4 for n in norms)
    assert float(((a + b) / 2).norm()) < low
    # the points of the path themselves, without the clamping of at(), stay within 1.5 deviations
    inner = path.points[5:-5].norm(dim=1)
    assert float((inner - math.sqrt(a.numel())).abs().max()) < 1.5 * math.sqrt(0.5)


def test_path_ends_are_the_seeds_bit_for_bit():
    a, b = seeds(2)
    path = norm_aware_path(a, b)
    assert torch.equal(path.at(0.0), a)
    assert torch.equal(path.at(1.0), b)
    assert path.at(0.3).dtype == a.dtype
    assert path.at(0.3).shape == a.shape


def test_points_of_a_path_are_evenly_spaced():
    a, b = seeds(2)
    path = norm_aware_path(a, b)
    stops = [path.at(k / 6) for k in range(7)]
    steps = [float((p - q).norm()) for p, q in itertools.pairwise(stops)]
    assert max(steps) / min(steps) < 1.05
    with pytest.raises(ValueError, match=r"share 1\.5 of a path is not between 0 and 1"):
        path.at(1.5)


@pytest.mark.slow
def test_path_from_unlikely_norms_stays_in_the_shell():
    a, b = seeds(2, scale=0.8)
    path = norm_aware_path(a, b)
    low, high = chi_shell(a.numel(), 3.0)
    assert float(a.norm()) < low
    assert float(torch.lerp(path.points[0], path.points[1], 0.1).norm()) < low
    assert all(low - 1e-4 <= float(path.at(t).norm()) <= high + 1e-4 for t in (0.001, 0.01, 0.05, 0.3, 0.5, 0.99))
    assert torch.equal(path.at(1.0), b)


def angles(c, zs):
    return math.fsum(math.acos(float((c.double() * z).sum() / c.double().norm() / z.double().norm())) for z in zs)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_centroid_has_likely_norm_and_is_near_all_seeds(count):
    zs = seeds(count)
    d = zs[0].numel()
    centroid, paths = norm_aware_centroid(zs)
    assert float(centroid.norm()) == pytest.approx(math.sqrt(d - 1), abs=0.3)
    # On the shell, path lengths are proportional to angles. The mean of the seeds nearly minimises the sum of the
    # angles; a single seed does not.
    assert angles(centroid, zs) < 1.005 * angles(sum(zs), zs)
    assert angles(sum(zs), zs) < 0.95 * angles(zs[0], zs) or count == 2
    for path, z in zip(paths, zs, strict=True):
        assert path.at(0.0) is centroid
        assert torch.equal(path.at(1.0), z)
        torch.testing.assert_close((path.basis @ path.points[0]).float(), centroid.flatten())


def test_centroid_minimises_its_objective():
    zs = seeds(3)
    d = zs[0].numel()
    _, paths = norm_aware_centroid(zs)
    pairs = [float((zs[i] - zs[j]).norm()) for i, j in ((0, 1), (0, 2), (1, 2))]
    gap = 2 * sum(pairs) / 3 / 50

    def objective(c, inner):
        ends = [paths[0].basis.T @ z.flatten().double() for z in zs]
        return centroid_loss_by_loops([torch.cat([c[None], p, e[None]]) for p, e in zip(inner, ends)], d, gap)

    c, inner = paths[0].points[0], [p.points[1:-1] for p in paths]
    ours = objective(c, inner)
    mean = sum(paths[0].basis.T @ z.flatten().double() for z in zs) / 3
    for other in (mean, c * 1.02, c * 0.98, c + torch.tensor([0.5, -0.5, 0.0]).double()):
        shares = torch.linspace(1, 0, 50).double()[1:-1, None]
        assert ours < objective(other, [points + shares * (other - c) for points in inner])


def test_paths_and_centroids_are_deterministic_and_run_in_inference_mode():
    zs = seeds(3)
    centroid, _ = norm_aware_centroid(zs)
    middle = norm_aware_path(*zs[:2]).at(0.5)
    with torch.inference_mode():
        zs = [z.clone() for z in zs]
        again, _ = norm_aware_centroid(zs)
        assert torch.equal(again, centroid)
        assert torch.equal(norm_aware_path(*zs[:2]).at(0.5), middle)


def test_path_and_centroid_of_equal_seeds_are_the_seed():
    (z,) = seeds(1)
    path = norm_aware_path(z, z.clone(), iterations=100)
    torch.testing.assert_close(path.at(0.4), z)
    centroid, _ = norm_aware_centroid([z, z.clone()], iterations=100)
    assert float((centroid - z).norm()) < 0.5


def test_seeds_without_a_path_rejected():
    a, b = seeds(2)
    with pytest.raises(ValueError, match=r"noises 1 and 2 are opposite \(cosine -1\.0000\)"):
        norm_aware_path(a, -a)
    with pytest.raises(ValueError, match="expected at least 2 noises for a path or centroid, got 1; use 2"):
        norm_aware_centroid([a])
    with pytest.raises(ValueError, match=r"different sizes, .*; use one image size"):
        norm_aware_path(a, seeds(1, (1, 4, 8, 9))[0])
    with pytest.raises(ValueError, match="2 points are too few for a path"):
        norm_aware_path(a, b, points=2)
    with pytest.raises(ValueError, match="noise is not finite"):
        norm_aware_path(a, b * math.nan)
    x, y = a / a.norm(), b / b.norm()
    y = (y - x * (x * y).sum()) / (y - x * (x * y).sum()).norm()
    triangle = [16 * (math.cos(t) * x + math.sin(t) * y) for t in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
    with pytest.raises(ValueError, match="mean of the noises is almost 0"):
        norm_aware_centroid(triangle)
