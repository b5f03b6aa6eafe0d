"""Contact sheets: images in rows, each with its captions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .sheets import FAINT, INK, Sheet

# in pixels
GAP, LINE = 8, 16  # gap between parts of the sheet, height of a line of text
MIN_SIDE, MAX_SIDE = 192, 512  # smallest and largest side of an image on the sheet


@dataclass(frozen=True, eq=False)
class Tile:
    """An image [H, W, 3] in 0..1 with its captions, one per line."""

    image: Tensor
    captions: tuple[str, ...]


def draw_grid(tiles: Sequence[Tile], columns: int = 0) -> Tensor:
    """Contact sheet [H', W', 3] of at least one tile, row by row; the font of long captions shrinks until they fit.

    ``columns``: tiles in a row; 0: as many as make the sheet about square.
    """
    sizes = [shown_size(tile.image) for tile in tiles]
    width, height = max(max(w for w, _ in sizes), MIN_SIDE), max(h for _, h in sizes)
    height += GAP // 2 + LINE * max(len(tile.captions) for tile in tiles)
    columns = columns or math.ceil(len(tiles) ** 0.5)
    sheet = Sheet(columns * (width + GAP) + GAP, -(-len(tiles) // columns) * (height + GAP) + GAP)
    for k, (tile, (w, h)) in enumerate(zip(tiles, sizes, strict=True)):
        x, y = GAP + k % columns * (width + GAP), GAP + k // columns * (height + GAP)
        paste(sheet, x, y, tile.image, w, h)
        for n, caption in enumerate(tile.captions):
            colour = FAINT if n else INK
            sheet.text(x, y + h + GAP // 2 + n * LINE, caption, font_size(caption, width), colour)
    return sheet.tensor()


def shown_size(image: Tensor) -> tuple[int, int]:
    """(width, height) of an image on the sheet: small images are scaled by an integer, large images to MAX_SIDE."""
    height, width = image.shape[:2]
    scale = MAX_SIDE / max(height, width)
    if scale >= 1:
        scale = max(1, min(math.floor(scale), math.ceil(MIN_SIDE / max(height, width))))
    return max(1, round(width * scale)), max(1, round(height * scale))


def paste(sheet: Sheet, x: int, y: int, image: Tensor, width: int, height: int) -> None:
    image = image.detach().cpu().float()
    if height < image.shape[0]:  # the sheet resizes by nearest neighbour, which would drop rows of pixels
        small = F.interpolate(image.movedim(-1, 0)[None], (height, width), mode="bilinear", antialias=True)
        image = small[0].movedim(0, -1)
    sheet.paste(x, y, image, width, height)


def font_size(text: str, width: int) -> int:
    """Largest font size, 13 down to 7, at which ``text`` is at most ``width`` pixels wide."""
    return next((size for size in range(13, 7, -1) if Sheet.text_width(text, size) <= width), 7)
