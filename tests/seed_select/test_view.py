"""The best image beside the score curves."""

import pytest
import torch

from chorus.common.sheets import PAPER
from chorus.common.tiles import Tile
from chorus.techniques.seed_select.records import ScoreSeries
from chorus.techniques.seed_select.view import BEST, POINT, draw_preview


def tile(value=0.5, size=(64, 64), captions=("1: seed 0", "score 0.1")):
    return Tile(torch.full((*size, 3), value), captions)


def has(sheet, colour):
    return (sheet - torch.tensor(colour) / 255).abs().amax(-1) < 1e-3


def rows_of(sheet, colour):
    return has(sheet, colour).any(1).nonzero().flatten()


def columns_of(sheet, colour):
    return has(sheet, colour).any(0).nonzero().flatten()


def test_low_scores_are_at_the_bottom_and_the_best_so_far_never_rises():
    series = ScoreSeries("one", (10, 20, 30, 40), (3.0, 1.0, 2.0, 0.0))
    sheet = draw_preview(tile(), [series])
    points = [columns_of(sheet[rows], POINT) for rows in (slice(None),)]
    assert len(points[0]) >= 4 * 5 - 4
    rows = rows_of(sheet, POINT)
    top = columns_of(sheet[rows[:5]], POINT).float().mean()
    bottom = columns_of(sheet[rows[-5:]], POINT).float().mean()
    assert top < bottom  # the first score is the highest, the last the lowest
    line = [rows_of(sheet[:, [x]], BEST) for x in columns_of(sheet, BEST).tolist()]
    tops = [float(r.min()) for r in line]
    assert tops == sorted(tops)


def test_every_series_has_its_own_scale():
    """Scores of different step counts are not comparable: an offset of one series changes only its labels."""
    first = ScoreSeries("a", (1, 2, 3), (5.0, 4.0, 4.5))
    sheets = [draw_preview(tile(), [first, ScoreSeries("b", (4, 5, 6), (s, s + 1, s + 2))]) for s in (0.0, 5000.0)]
    assert torch.equal(has(sheets[0], POINT), has(sheets[1], POINT))
    alone = draw_preview(tile(), [first])
    height = alone.shape[0] // 2
    assert torch.equal(has(sheets[0], POINT)[:height, : alone.shape[1]], has(alone, POINT)[:height])


@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("points", [1, 2, 200])
def test_any_number_of_series_and_points_can_be_drawn(count, points):
    scores = torch.rand(points, generator=torch.Generator().manual_seed(1)).tolist()
    series = [ScoreSeries(f"series {k}", tuple(range(k, k + points)), tuple(scores)) for k in range(count)]
    sheet = draw_preview(tile(), series)
    assert sheet.dtype == torch.float32 and sheet.shape[-1] == 3
    assert 0 <= float(sheet.min()) <= float(sheet.max()) <= 1
    assert bool(has(sheet, POINT).any()) == (count > 0)
    for edge in (sheet[:2], sheet[-2:], sheet[:, :2], sheet[:, -2:]):
        assert has(edge, PAPER).all()


def test_equal_scores_are_drawn_as_a_horizontal_line():
    sheet = draw_preview(tile(), [ScoreSeries("same", (1, 2, 3), (0.5, 0.5, 0.5))])
    assert len(rows_of(sheet, BEST)) <= 2
