"""What a Cas-DM head does to noisy pictures: the model's guess, the head's, their mix, the truth, a row for each level."""

from collections.abc import Sequence

from torch import Tensor

from ...common.sheets import FAINT, INK, Sheet

COLUMNS = ("model", "head", "mix", "truth")
GAP, LINE, LABEL, NARROWEST, WIDEST = 8, 18, 96, 96, 256


def draw_examples(rows: Sequence[tuple[str, str, Sequence[Tensor]]]) -> Tensor:
    """A sheet [H', W', 3]; every row is two lines of text and a picture [H, W, 3] in 0..1 for each of ``COLUMNS``."""
    sizes = [_shown_size(pictures[0]) for _, _, pictures in rows]
    width = max(w for w, _ in sizes)
    sheet = Sheet(LABEL + len(COLUMNS) * (width + GAP) + GAP, 2 * GAP + LINE + sum(h + GAP for _, h in sizes))
    for k, name in enumerate(COLUMNS):
        sheet.text(LABEL + GAP + k * (width + GAP), GAP, name)
    y = GAP + LINE
    for (first, second, pictures), (w, h) in zip(rows, sizes):
        sheet.text(GAP, y, first, colour=INK)
        sheet.text(GAP, y + LINE, second, colour=FAINT)
        for k, picture in enumerate(pictures):
            sheet.paste(LABEL + GAP + k * (width + GAP), y, picture, w, h)
        y += h + GAP
    return sheet.tensor()


def _shown_size(picture: Tensor) -> tuple[int, int]:
    """Width and height at which a picture shows."""
    height, width = picture.shape[:2]
    scale = min(max(NARROWEST / max(height, width), 1.0), WIDEST / max(height, width))
    return max(1, round(width * scale)), max(1, round(height * scale))
