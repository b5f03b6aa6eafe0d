"""Views of SeedSelect: a grid of the best candidates, and the best image beside the score curve."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ...common.sheets import FAINT, INK, Sheet, model_colour
from .records import ScoreSeries

# in pixels
GAP, LINE = 8, 16  # gap between parts of the sheet, height of a line of text
MIN_SIDE, MAX_SIDE = 192, 512  # smallest and largest side of an image on the sheet
PANEL, MARGIN = (320, 132), 56  # width and height of a score curve; width of the labels on its left
POINT, BEST = model_colour(2), model_colour(1)


@dataclass(frozen=True, eq=False)
class Tile:
    """An image [H, W, 3] in 0..1 with its captions, one per line."""

    image: Tensor
    captions: tuple[str, ...]


def draw_grid(tiles: Sequence[Tile]) -> Tensor:
    """Contact sheet [H', W', 3] of at least one tile, row by row; the font of long captions shrinks until they fit."""
    sizes = [_shown_size(tile.image) for tile in tiles]
    width, height = max(max(w for w, _ in sizes), MIN_SIDE), max(h for _, h in sizes)
    height += GAP // 2 + LINE * max(len(tile.captions) for tile in tiles)
    columns = math.ceil(len(tiles) ** 0.5)
    sheet = Sheet(columns * (width + GAP) + GAP, -(-len(tiles) // columns) * (height + GAP) + GAP)
    for k, (tile, (w, h)) in enumerate(zip(tiles, sizes, strict=True)):
        x, y = GAP + k % columns * (width + GAP), GAP + k // columns * (height + GAP)
        _paste(sheet, x, y, tile.image, w, h)
        for n, caption in enumerate(tile.captions):
            colour = FAINT if n else INK
            sheet.text(x, y + h + GAP // 2 + n * LINE, caption, _font_size(caption, width), colour)
    return sheet.tensor()


def draw_preview(tile: Tile, series: Sequence[ScoreSeries]) -> Tensor:
    """Contact sheet [H', W', 3] of the image with its captions and the score curve.

    Each line of the curve has a separate panel with a separate scale.
    """
    w, h = _shown_size(tile.image)
    left = max(w, MIN_SIDE)
    columns = 1 if len(series) < 4 else 2
    rows = -(-len(series) // columns)
    across, down = MARGIN + PANEL[0] + GAP, PANEL[1] + 3 * LINE
    captioned = h + GAP // 2 + LINE * len(tile.captions)
    sheet = Sheet(2 * GAP + left + columns * across, max(captioned, rows * down) + 2 * GAP)
    _paste(sheet, GAP, GAP, tile.image, w, h)
    for n, caption in enumerate(tile.captions):
        sheet.text(GAP, GAP + h + GAP // 2 + n * LINE, caption, _font_size(caption, left), FAINT if n else INK)
    for k, line in enumerate(series):
        _draw_series(sheet, 2 * GAP + left + k % columns * across + MARGIN, GAP + k // columns * down, line)
    return sheet.tensor()


def _draw_series(sheet: Sheet, x: int, y: int, series: ScoreSeries) -> None:
    """Draw every score as a point and the lowest score so far as a line, over evaluations; low scores at the bottom."""
    (width, height), top = PANEL, y + LINE
    sheet.text(x, y, series.label, _font_size(series.label, width))
    sheet.box(x, top + height, width, 1, FAINT)
    sheet.box(x - 1, top, 1, height + 1, FAINT)
    low, high = min(series.scores), max(series.scores)
    first, last = series.evaluations[0], series.evaluations[-1]

    def place(evaluations: int, score: float) -> tuple[int, int]:
        share = (evaluations - first) / max(1, last - first)
        above = (score - low) / (high - low) if high > low else 0.0
        return x + 4 + round(share * (width - 9)), top + 4 + round((1 - above) * (height - 9))

    points = [place(*p) for p in zip(series.evaluations, series.scores, strict=True)]
    best = [place(*p) for p in zip(series.evaluations, series.best, strict=True)]
    for (px, py), (qx, qy) in itertools.pairwise(best):
        sheet.box(px, py, qx - px + 2, 2, BEST)
        sheet.box(qx, py, 2, qy - py + 2, BEST)
    for px, py in points:
        sheet.box(px - 2, py - 2, 5, 5, POINT)
    for score, at in ((high, top), (low, top + height - LINE))[high == low :]:
        text = f"{score:.4g}"
        sheet.text(x - GAP - Sheet.text_width(text, 11), at, text, 11, FAINT)
    sheet.text(x, top + height + 2, f"{first}", 11, FAINT)
    if last > first:
        end = f"{last} evaluations"
        sheet.text(x + width - Sheet.text_width(end, 11), top + height + 2, end, 11, FAINT)


def _shown_size(image: Tensor) -> tuple[int, int]:
    """(width, height) of an image on the sheet: small images are scaled by an integer, large images to MAX_SIDE."""
    height, width = image.shape[:2]
    scale = MAX_SIDE / max(height, width)
    if scale >= 1:
        scale = max(1, min(math.floor(scale), math.ceil(MIN_SIDE / max(height, width))))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _paste(sheet: Sheet, x: int, y: int, image: Tensor, width: int, height: int) -> None:
    image = image.detach().cpu().float()
    if height < image.shape[0]:  # the sheet resizes by nearest neighbour, which would drop rows of pixels
        small = F.interpolate(image.movedim(-1, 0)[None], (height, width), mode="bilinear", antialias=True)
        image = small[0].movedim(0, -1)
    sheet.paste(x, y, image, width, height)


def _font_size(text: str, width: int) -> int:
    """Largest font size, 13 down to 7, at which ``text`` is at most ``width`` pixels wide."""
    return next((size for size in range(13, 7, -1) if Sheet.text_width(text, size) <= width), 7)
