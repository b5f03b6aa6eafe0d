"""Preview of a Cas-DM head on noisy images: columns model, head, mix and truth, a row for each noise level."""

from collections.abc import Sequence

from torch import Tensor

from ...common.sheets import FAINT, INK, Sheet

COLUMNS = ("model", "head", "mix", "truth")
GAP, LINE, LABEL, NARROWEST, WIDEST = 8, 18, 96, 96, 256


def draw_examples(rows: Sequence[tuple[str, str, Sequence[Tensor]]]) -> Tensor:
    """Contact sheet [H', W', 3]. Each of ``rows`` has two lines of text and, per column, an image [H, W, 3] in 0..1."""
    sizes = [_shown_size(images[0]) for _, _, images in rows]
    width = max(w for w, _ in sizes)
    sheet = Sheet(LABEL + len(COLUMNS) * (width + GAP) + GAP, 2 * GAP + LINE + sum(h + GAP for _, h in sizes))
    for k, name in enumerate(COLUMNS):
        sheet.text(LABEL + GAP + k * (width + GAP), GAP, name)
    y = GAP + LINE
    for (first, second, images), (w, h) in zip(rows, sizes):
        sheet.text(GAP, y, first, colour=INK)
        sheet.text(GAP, y + LINE, second, colour=FAINT)
        for k, image in enumerate(images):
            sheet.paste(LABEL + GAP + k * (width + GAP), y, image, w, h)
        y += h + GAP
    return sheet.tensor()


def _shown_size(image: Tensor) -> tuple[int, int]:
    """Width and height at which an image is shown."""
    height, width = image.shape[:2]
    scale = min(max(NARROWEST / max(height, width), 1.0), WIDEST / max(height, width))
    return max(1, round(width * scale)), max(1, round(height * scale))
