"""Fréchet distances, against closed forms and scipy's matrix root; their intervals, against sets whose answer is known."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from chorus.techniques.face_refiner import frechet as module
from chorus.techniques.face_refiner.frechet import frechet, frechet_both, frechet_difference, frechet_distance

pytestmark = pytest.mark.usefixtures("one_thread")


def interval(*args, **kwargs):
    found = frechet(*args, **kwargs)
    return found.low, found.high


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=seeded(seed), dtype=torch.float64)


def by_scipy(a: torch.Tensor, b: torch.Tensor) -> float:
    """The definition in its usual form, tr (Σa Σb)^½ by scipy."""
    a, b = a.double().numpy(), b.double().numpy()
    of_a, of_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    spread = np.trace(of_a + of_b - 2 * sqrtm(of_a @ of_b).real)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + spread)


@pytest.mark.parametrize(("rows", "width"), [((90, 200), 24), ((40, 33), 8)])
def test_distance_is_scipys(rows, width):
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


def test_fewer_rows_than_features():
    # two flat sets in directions of their own share nothing: all of their spread counts
    a, b = torch.zeros(5, 40).double(), torch.zeros(6, 40).double()
    a[:, :4], b[:, 20:24] = normal(5, 4, 1), normal(6, 4, 2)
    mean = float((a.mean(0) - b.mean(0)).square().sum())
    assert frechet_distance(a, b) == pytest.approx(mean + float(a.var(0).sum() + b.var(0).sum()), rel=1e-7)
    # padding with empty features changes nothing, whether or not the sets fill them together
    wide = frechet_distance(*(torch.nn.functional.pad(x, (0, 300)) for x in (a, b)))
    assert wide == pytest.approx(frechet_distance(a, b), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_far_from_the_origin_and_in_narrow_numbers(dtype):
    a, b = ((x + 30).to(dtype) for x in (normal(200, 12, 1), normal(200, 12, 2) * 1.5))
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-9)


def test_equal_sets_are_at_no_distance():
    a = normal(300, 20, 1)
    assert 0.0 <= frechet_distance(a, a) < 1e-6 * float(a.var(0).sum())
    difference = frechet_difference(a, a, normal(100, 20, 2), seeded())
    assert difference.value == difference.low == difference.high == 0.0


def test_leaving_out_is_computing_without():
    x, blocks = normal(30, 6, 1) + 3, torch.arange(30) % 4
    for k, found in enumerate(module._without(x, blocks)):
        rest = x[blocks != k]
        torch.testing.assert_close(found.mean, rest.mean(0))
        torch.testing.assert_close(found.covariance, rest.mT.cov())


def test_interval_uses_students_t_with_one_degree_fewer_than_blocks():
    """The 97.5 % quantiles as tables print them; a normal approximation is far too small at 2 degrees of freedom."""
    for blocks, quantile in ((3, 4.303), (5, 2.776), (10, 2.262), (50, 2.010)):
        left_out = torch.linspace(0.9, 1.1, blocks, dtype=torch.float64)
        error = math.sqrt(float((left_out - 1.0).square().sum()) * (blocks - 1) / blocks)
        found = module._estimate(1.0, [left_out])
        assert (found.high - 1.0) / error == pytest.approx(quantile, abs=5e-4)
        assert (1.0 - found.low) / error == pytest.approx(quantile, abs=5e-4)


WIDTH, ROWS, REPEATS = 12, 150, 80
SPREAD = torch.linspace(0.4, 2, WIDTH).double()


def draw(repeat: int, *, paired: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of Gaussians whose distance is WIDTH · 0.2² + Σ (0.25 SPREAD)²."""
    a, own = normal(ROWS, WIDTH, 2 * repeat), normal(ROWS, WIDTH, 2 * repeat + 1)
    b = 0.8 * a + 0.6 * own if paired else own
    return a * SPREAD, 1.25 * b * SPREAD + 0.2


TRUTH = WIDTH * 0.2**2 + float((0.25 * SPREAD).square().sum())


@pytest.mark.parametrize("paired", [False, True])
def test_interval_and_correction(paired):
    """Of 80 experiments: the interval holds the mean of all as often as it says, and not by being wide."""
    found = [frechet(*draw(i, paired=paired), seeded(), draws=20, paired=paired) for i in range(REPEATS)]
    values = np.array([f.value for f in found])
    middle = values.mean()
    covered = np.mean([f.low <= middle <= f.high for f in found])
    assert 0.90 <= covered <= 1.0
    half = np.mean([f.high - f.low for f in found]) / 2
    assert half == pytest.approx(2.09 * values.std(), rel=0.3)
    # the distance itself is too large by much more than its correction is off
    corrected = np.array([f.corrected for f in found])
    error = corrected.std() / math.sqrt(REPEATS)
    assert abs(corrected.mean() - TRUTH) < 3 * error < 0.35 * (middle - TRUTH)
    assert np.mean([abs(f.corrected - TRUTH) <= (f.high - f.low) / 2 for f in found]) >= 0.90


def test_difference_of_pairs_is_more_certain_than_either():
    """a2 is a1, a little changed: the difference's interval holds its mean, and is far narrower than one distance's."""
    found, single = [], []
    for i in range(REPEATS):
        a1, b = draw(i)
        a2 = a1 * 1.1 + 0.1 * normal(ROWS, WIDTH, 1000 + i)
        found.append(frechet_difference(a1, a2, b, seeded(), draws=20))
        single.append(interval(a1, b, seeded(), draws=20))
    values = np.array([f.value for f in found])
    assert np.mean([f.low <= values.mean() <= f.high for f in found]) >= 0.90
    half = np.mean([f.high - f.low for f in found]) / 2
    assert half == pytest.approx(2.09 * values.std(), rel=0.3)
    assert half < 0.5 * np.mean([(high - low) / 2 for low, high in single])


def test_difference_is_that_of_distances():
    a1, b = draw(0)
    a2 = a1 * 1.3
    found = frechet_difference(a1, a2, b, seeded())
    assert found.value == pytest.approx(frechet_distance(a1, b) - frechet_distance(a2, b), rel=1e-9)
    both = frechet_both(a1, a2, b, seeded(1))
    alone = *(frechet(a, b, seeded(1)) for a in (a1, a2)), frechet_difference(a1, a2, b, seeded(1))
    for one, other in zip(both, alone):
        assert one == pytest.approx(other, rel=1e-9)
    back = frechet_difference(a2, a1, b, seeded())
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_one_seed_gives_one_interval():
    a, b = draw(0)
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
def test_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_refused_intervals():
    with pytest.raises(ValueError, match="5 and 4 rows are no pairs"):
        frechet(torch.randn(5, 2), torch.randn(4, 2), seeded(), paired=True)
    with pytest.raises(ValueError, match="2 blocks"):
        frechet(torch.randn(2, 2), torch.randn(40, 2), seeded())
    with pytest.raises(ValueError, match="5 and 4 rows are no pairs"):
        frechet_difference(torch.randn(5, 2), torch.randn(4, 2), torch.randn(9, 2), seeded())
