"""What SeedSelect shows: the best candidates side by side, and the best picture beside the score curve."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ...common.sheets import FAINT, INK, Sheet, model_colour
from .records import ScoreSeries

GAP, LINE, NARROWEST, WIDEST = 8, 16, 192, 512
PANEL, MARGIN = (320, 132), 56  # pixels of a score curve, and of its labels on the left
POINT, BEST = model_colour(2), model_colour(1)


@dataclass(frozen=True, eq=False)
class Tile:
    """A picture [H, W, 3] in 0..1 with its captions, one a line."""

    picture: Tensor
    captions: tuple[str, ...]


def draw_grid(tiles: Sequence[Tile]) -> Tensor:
    """A sheet [H', W', 3] of at least one tile, row by row; the captions shrink until they fit."""
    sizes = [_shown_size(tile.picture) for tile in tiles]
    width, height = max(max(w for w, _ in sizes), NARROWEST), max(h for _, h in sizes)
    height += GAP // 2 + LINE * max(len(tile.captions) for tile in tiles)
    columns = math.ceil(len(tiles) ** 0.5)
    sheet = Sheet(columns * (width + GAP) + GAP, -(-len(tiles) // columns) * (height + GAP) + GAP)
    for k, (tile, (w, h)) in enumerate(zip(tiles, sizes, strict=True)):
        x, y = GAP + k % columns * (width + GAP), GAP + k // columns * (height + GAP)
        _paste(sheet, x, y, tile.picture, w, h)
        for n, caption in enumerate(tile.captions):
            colour = FAINT if n else INK
            sheet.text(x, y + h + GAP // 2 + n * LINE, caption, _fitting(caption, width), colour)
    return sheet.tensor()


def draw_preview(tile: Tile, series: Sequence[ScoreSeries]) -> Tensor:
    """A sheet [H', W', 3]: the picture with its captions, and a panel with a scale of its own for each series."""
    w, h = _shown_size(tile.picture)
    left = max(w, NARROWEST)
    columns = 1 if len(series) < 4 else 2
    rows = -(-len(series) // columns)
    across, down = MARGIN + PANEL[0] + GAP, PANEL[1] + 3 * LINE
    captioned = h + GAP // 2 + LINE * len(tile.captions)
    sheet = Sheet(2 * GAP + left + columns * across, max(captioned, rows * down) + 2 * GAP)
    _paste(sheet, GAP, GAP, tile.picture, w, h)
    for n, caption in enumerate(tile.captions):
        sheet.text(GAP, GAP + h + GAP // 2 + n * LINE, caption, _fitting(caption, left), FAINT if n else INK)
    for k, line in enumerate(series):
        _draw_series(sheet, 2 * GAP + left + k % columns * across + MARGIN, GAP + k // columns * down, line)
    return sheet.tensor()


def _draw_series(sheet: Sheet, x: int, y: int, series: ScoreSeries) -> None:
    """Every score as a point and the lowest so far as a line, over evaluations; low scores are at the bottom."""
    (width, height), top = PANEL, y + LINE
    sheet.text(x, y, series.label, _fitting(series.label, width))
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


def _shown_size(picture: Tensor) -> tuple[int, int]:
    """(width, height) near that of the picture: small ones times a whole number, large ones shrunk."""
    height, width = picture.shape[:2]
    scale = WIDEST / max(height, width)
    if scale >= 1:
        scale = max(1, min(math.floor(scale), math.ceil(NARROWEST / max(height, width))))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _paste(sheet: Sheet, x: int, y: int, picture: Tensor, width: int, height: int) -> None:
    picture = picture.detach().cpu().float()
    if height < picture.shape[0]:  # the sheet would leave out rows of pixels
        small = F.interpolate(picture.movedim(-1, 0)[None], (height, width), mode="bilinear", antialias=True)
        picture = small[0].movedim(0, -1)
    sheet.paste(x, y, picture, width, height)


def _fitting(text: str, width: int) -> int:
    """The largest size, 13 down to 7, at which ``text`` is no wider than ``width``."""
    return next((size for size in range(13, 7, -1) if Sheet.text_width(text, size) <= width), 7)
