"""Contact sheets."""

import pytest
import torch

from chorus.common.sheets import Sheet
from chorus.common.tiles import MAX_SIDE, MIN_SIDE, Tile, draw_grid, font_size


def tile(value=0.5, size=(64, 64), captions=("1: seed 0", "score 0.1")):
    return Tile(torch.full((*size, 3), value), captions)


def has(sheet, colour):
    return (sheet - torch.tensor(colour) / 255).abs().amax(-1) < 1e-3


def test_grid_shows_every_image_row_by_row():
    values = [k / 10 for k in range(1, 8)]
    sheet = draw_grid([tile(v) for v in values])
    centres = []
    for v in values:
        found = (sheet - round(v * 255) / 255).abs().amax(-1) < 1e-3
        assert found.sum() > 100 * 100
        y, x = (found.nonzero().float().median(0).values).tolist()
        centres.append((round(y), x))
    assert centres == sorted(centres)
    assert len({y for y, _ in centres}) == 3


@pytest.mark.parametrize("size", [(1, 1), (32, 48), (64, 8), (512, 512), (1024, 512), (700, 3000)], ids=str)
def test_images_of_any_size_keep_their_aspect_ratio(size):
    sheet = draw_grid([tile(1.0, size, ())])
    height, width = (int(has(sheet, (255, 255, 255)).sum(d).max()) for d in (0, 1))
    assert width / height == pytest.approx(size[1] / size[0], rel=0.02)
    assert max(width, height) <= MAX_SIDE
    assert max(width, height) >= MIN_SIDE or max(size) < MIN_SIDE


def test_small_images_keep_their_pixels_and_large_ones_are_averaged():
    small = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    sheet = draw_grid([Tile(small, ())])
    assert torch.allclose(sheet[8 : 8 + 192, 8 : 8 + 192][12::24, 12::24], small, atol=1e-3)
    stripes = (torch.arange(1024) % 2).float()[:, None, None].expand(1024, 1024, 3)
    shown = draw_grid([Tile(stripes, ())])[100:400, 100:400]
    assert float((shown - 0.5).abs().max()) < 0.02


def test_longest_seed_fits_the_narrowest_tile():
    caption = f"16: seed {2**64 - 1}"
    assert Sheet.text_width(caption, font_size(caption, MIN_SIDE)) <= MIN_SIDE
    assert font_size("1: seed 7", MIN_SIDE) == 13
    plain, written = (draw_grid([tile(captions=c)]) for c in (("", ""), (caption, "")))
    assert not torch.equal(plain, written)
    assert torch.equal(plain[:, -8:], written[:, -8:])  # the caption does not reach the edge


def test_number_of_columns_can_be_given():
    wide, tall = (draw_grid([tile(v / 10) for v in range(6)], columns) for columns in (3, 2))
    assert wide.shape[1] * 2 > tall.shape[1] * 2.5
    assert tall.shape[0] > 1.4 * wide.shape[0]
