"""The references nearest to their common centre, compared with a search among all choices and by hand."""

import itertools

import pytest
import torch

from chorus.techniques.seed_select.references import nearest_to_centre


def points(*values):
    return torch.tensor(values)


def test_outliers_that_move_the_mean_are_left_out():
    # the mean of all, (4, 1.8), is nearer to the fourth than to the others
    vectors = points([0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [5.0, 2.0], [14.0, 6.0])
    found = nearest_to_centre(vectors, 3)
    assert found.used == (1, 2, 3)
    assert found.left_out == (4, 5)
    centre = vectors[:3].mean(0)
    assert found.distances == pytest.approx([float((v - centre).norm()) for v in vectors], rel=1e-6)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [2, 3, 5])
def test_close_references_are_found_among_scattered_ones(seed, count):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(8, generator=generator)
    close = 0.2 * torch.randn(count, 6, generator=generator)
    vectors = torch.cat([close, 3.0 * torch.randn(8 - count, 6, generator=generator)])[order]

    def width(chosen):
        rows = vectors[list(chosen)]
        return float((rows - rows.mean(0)).norm())

    tightest = min(itertools.combinations(range(8), count), key=width)
    assert nearest_to_centre(vectors, count).used == tuple(k + 1 for k in tightest)


def test_last_of_equal_distances_is_left_out():
    assert nearest_to_centre(points([0.0, 1.0], [1.0, 0.3]), 1).used == (1,)
    assert nearest_to_centre(torch.ones(4, 3), 2).used == (1, 2)
    assert nearest_to_centre(points([0.1, 0.0], [-0.1, 0.0], [0.0, 0.1], [0.0, -0.1]), 3).used == (1, 2, 3)


def test_all_references_can_be_used():
    found = nearest_to_centre(points([0.0], [2.0]), 2)
    assert found.used == (1, 2)
    assert found.report() == "references used (distance from their mean): 1 (1), 2 (1); left out: none"
    found = nearest_to_centre(points([0.0], [2.0], [30.0]), 2)
    assert found.report() == "references used (distance from their mean): 1 (1), 2 (1); left out: 3 (29)"


@pytest.mark.parametrize("count", [0, 4])
def test_more_references_than_there_are_rejected(count):
    with pytest.raises(ValueError, match=rf"references_used {count} is outside 1 to 3, the number of references"):
        nearest_to_centre(torch.zeros(3, 2), count)
