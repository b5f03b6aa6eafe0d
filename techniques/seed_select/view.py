"""View of SeedSelect: the best image beside the score curve."""

import itertools
from collections.abc import Sequence

from torch import Tensor

from ...common.sheets import FAINT, INK, Sheet, model_colour
from ...common.tiles import GAP, LINE, MIN_SIDE, Tile, font_size, paste, shown_size
from .records import ScoreSeries

# in pixels
PANEL, MARGIN = (320, 132), 56  # width and height of a score curve; width of the labels on its left
POINT, BEST = model_colour(2), model_colour(1)


def draw_preview(tile: Tile, series: Sequence[ScoreSeries]) -> Tensor:
    """Contact sheet [H', W', 3] of the image with its captions and the score curve.

    Each line of the curve has a separate panel with a separate scale.
    """
    w, h = shown_size(tile.image)
    left = max(w, MIN_SIDE)
    columns = 1 if len(series) < 4 else 2
    rows = -(-len(series) // columns)
    across, down = MARGIN + PANEL[0] + GAP, PANEL[1] + 3 * LINE
    captioned = h + GAP // 2 + LINE * len(tile.captions)
    sheet = Sheet(2 * GAP + left + columns * across, max(captioned, rows * down) + 2 * GAP)
    paste(sheet, GAP, GAP, tile.image, w, h)
    for n, caption in enumerate(tile.captions):
        sheet.text(GAP, GAP + h + GAP // 2 + n * LINE, caption, font_size(caption, left), FAINT if n else INK)
    for k, line in enumerate(series):
        _draw_series(sheet, 2 * GAP + left + k % columns * across + MARGIN, GAP + k // columns * down, line)
    return sheet.tensor()


def _draw_series(sheet: Sheet, x: int, y: int, series: ScoreSeries) -> None:
    """Draw every score as a point and the lowest score so far as a line, over evaluations; low scores at the bottom."""
    (width, height), top = PANEL, y + LINE
    sheet.text(x, y, series.label, font_size(series.label, width))
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
