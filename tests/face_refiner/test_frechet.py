"""Fréchet distances compared with closed forms and scipy's matrix root; intervals of sets with known distance."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from chorus.techniques.face_refiner import frechet as module
from chorus.techniques.face_refiner.frechet import frechet, frechet_both, frechet_difference, frechet_distance

pytestmark = pytest.mark.usefixtures("one_thread")


def interval(*args, **kwargs):
    results = frechet(*args, **kwargs)
    return results.low, results.high


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=seeded(seed), dtype=torch.float64)


def by_scipy(a: torch.Tensor, b: torch.Tensor) -> float:
    """The definition in its usual form; scipy computes tr (Σa Σb)^½."""
    a, b = a.double().numpy(), b.double().numpy()
    of_a, of_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    spread = np.trace(of_a + of_b - 2 * sqrtm(of_a @ of_b).real)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + spread)


@pytest.mark.parametrize(("rows", "width"), [((90, 200), 24), ((40, 33), 8)])
def test_distance_matches_scipy(rows, width):
    a = normal(rows[0], width, 1) @ normal(width, width, 2)
    b = normal(rows[1], width, 3) @ normal(width, width, 4) + 0.7
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def whitened(rows: int, width: int, seed: int) -> torch.Tensor:
    """Rows of mean 0 and covariance 1, exactly."""
    x = normal(rows, width, seed)
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(x.mT.cov()), x.mT, upper=False).mT


def test_distance_of_gaussians_with_common_axes_is_the_closed_form():
    axes = torch.linalg.qr(normal(16, 16, 5)).Q
    spread_a, spread_b = torch.linspace(0.1, 3, 16).double(), torch.linspace(2, 0.5, 16).double()
    a = whitened(100, 16, 6) * spread_a @ axes
    b = whitened(70, 16, 7) * spread_b @ axes + 2.0
    expected = 16 * 2.0**2 + float((spread_a - spread_b).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_distance_of_fewer_rows_than_features():
    # two sets in orthogonal subspaces: the distance is the distance of the means plus the sum of their variances
    a, b = torch.zeros(5, 40).double(), torch.zeros(6, 40).double()
    a[:, :4], b[:, 20:24] = normal(5, 4, 1), normal(6, 4, 2)
    mean = float((a.mean(0) - b.mean(0)).square().sum())
    assert frechet_distance(a, b) == pytest.approx(mean + float(a.var(0).sum() + b.var(0).sum()), rel=1e-7)
    # padding with zero features changes nothing
    wide = frechet_distance(*(torch.nn.functional.pad(x, (0, 300)) for x in (a, b)))
    assert wide == pytest.approx(frechet_distance(a, b), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_distance_of_offset_features_in_low_precision(dtype):
    a, b = ((x + 30).to(dtype) for x in (normal(200, 12, 1), normal(200, 12, 2) * 1.5))
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-9)


def test_equal_sets_have_distance_zero():
    a = normal(300, 20, 1)
    assert 0.0 <= frechet_distance(a, a) < 1e-6 * float(a.var(0).sum())
    difference = frechet_difference(a, a, normal(100, 20, 2), seeded())
    assert difference.value == difference.low == difference.high == 0.0


def test_moments_without_a_block_match_those_of_the_other_rows():
    x, blocks = normal(30, 6, 1) + 3, torch.arange(30) % 4
    for k, results in enumerate(module._without(x, blocks)):
        rest = x[blocks != k]
        torch.testing.assert_close(results.mean, rest.mean(0))
        torch.testing.assert_close(results.covariance, rest.mT.cov())


def test_interval_uses_students_t_with_one_degree_fewer_than_blocks():
    """Compares with the 97.5 % quantiles of tables. A normal approximation is far too small at 2 degrees of freedom."""
    for blocks, quantile in ((3, 4.303), (5, 2.776), (10, 2.262), (50, 2.010)):
        left_out = torch.linspace(0.9, 1.1, blocks, dtype=torch.float64)
        error = math.sqrt(float((left_out - 1.0).square().sum()) * (blocks - 1) / blocks)
        results = module._estimate(1.0, [left_out])
        assert (results.high - 1.0) / error == pytest.approx(quantile, abs=5e-4)
        assert (1.0 - results.low) / error == pytest.approx(quantile, abs=5e-4)


WIDTH, ROWS, REPEATS = 12, 150, 80
SPREAD = torch.linspace(0.4, 2, WIDTH).double()


def gaussian_sets(repeat: int, *, paired: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of two Gaussians whose distance is WIDTH · 0.2² + Σ (0.25 SPREAD)²."""
    a, independent = normal(ROWS, WIDTH, 2 * repeat), normal(ROWS, WIDTH, 2 * repeat + 1)
    b = 0.8 * a + 0.6 * independent if paired else independent
    return a * SPREAD, 1.25 * b * SPREAD + 0.2


TRUTH = WIDTH * 0.2**2 + float((0.25 * SPREAD).square().sum())


@pytest.mark.slow
@pytest.mark.parametrize("paired", [False, True])
def test_interval_covers_the_mean_and_correction_removes_the_bias(paired):
    """In 80 experiments, the interval contains the mean distance as often as it should, and it is not too wide."""
    results = [
        frechet(*gaussian_sets(i, paired=paired), seeded(), block_count=20, paired=paired) for i in range(REPEATS)
    ]
    values = np.array([f.value for f in results])
    mean = values.mean()
    covered = np.mean([f.low <= mean <= f.high for f in results])
    assert 0.90 <= covered <= 1.0
    half = np.mean([f.high - f.low for f in results]) / 2
    assert half == pytest.approx(2.09 * values.std(), rel=0.3)
    # the bias of the distance is much larger than the error of the corrected value
    corrected = np.array([f.corrected for f in results])
    error = corrected.std() / math.sqrt(REPEATS)
    assert abs(corrected.mean() - TRUTH) < 3 * error < 0.35 * (mean - TRUTH)
    assert np.mean([abs(f.corrected - TRUTH) <= (f.high - f.low) / 2 for f in results]) >= 0.90


@pytest.mark.slow
def test_difference_has_a_narrower_interval_than_a_distance():
    """The interval of the difference contains its mean and is much narrower than the interval of a distance.

    a2 is a1 with slight changes.
    """
    results, single = [], []
    for i in range(REPEATS):
        a1, b = gaussian_sets(i)
        a2 = a1 * 1.1 + 0.1 * normal(ROWS, WIDTH, 1000 + i)
        results.append(frechet_difference(a1, a2, b, seeded(), block_count=20))
        single.append(interval(a1, b, seeded(), block_count=20))
    values = np.array([f.value for f in results])
    assert np.mean([f.low <= values.mean() <= f.high for f in results]) >= 0.90
    half = np.mean([f.high - f.low for f in results]) / 2
    assert half == pytest.approx(2.09 * values.std(), rel=0.3)
    assert half < 0.5 * np.mean([(high - low) / 2 for low, high in single])


def test_difference_equals_the_difference_of_distances():
    a1, b = gaussian_sets(0)
    a2 = a1 * 1.3
    results = frechet_difference(a1, a2, b, seeded())
    assert results.value == pytest.approx(frechet_distance(a1, b) - frechet_distance(a2, b), rel=1e-9)
    both = frechet_both(a1, a2, b, seeded(1))
    separate = *(frechet(a, b, seeded(1)) for a in (a1, a2)), frechet_difference(a1, a2, b, seeded(1))
    for one, other in zip(both, separate):
        assert one == pytest.approx(other, rel=1e-9)
    reverse = frechet_difference(a2, a1, b, seeded())
    assert (reverse.low, reverse.high) == pytest.approx((-results.high, -results.low))


def test_interval_depends_only_on_the_seed():
    a, b = gaussian_sets(0)
    assert interval(a, b, seeded(3)) == interval(a, b, seeded(3)) != interval(a, b, seeded(4))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.ones(5, 3), torch.ones(5, 4), r"\(5, 3\), \(5, 4\)"),
        (torch.ones(5, 3, 2), torch.ones(5, 2), "cannot be compared"),
        (torch.ones(5, 3), torch.ones(1, 3), "a set of 1"),
        (torch.ones(5, 3), torch.full((5, 3), math.nan), "NaN"),
    ],
)
def test_invalid_features_rejected(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_invalid_blocks_rejected():
    with pytest.raises(ValueError, match="5 and 4 rows cannot be paired"):
        frechet(torch.randn(5, 2), torch.randn(4, 2), seeded(), paired=True)
    with pytest.raises(ValueError, match="2 blocks"):
        frechet(torch.randn(2, 2), torch.randn(40, 2), seeded())
    with pytest.raises(ValueError, match="5 and 4 rows cannot be paired"):
        frechet_difference(torch.randn(5, 2), torch.randn(4, 2), torch.randn(9, 2), seeded())
