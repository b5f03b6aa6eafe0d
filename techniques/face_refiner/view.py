"""Preview of a face refiner on validation images: one row per image, with the columns source, refined and target."""

from collections.abc import Sequence

from torch import Tensor

from ...common.sheets import Sheet

PAIRED = ("source", "refined", "target")
UNPAIRED = ("source", "refined", "a target")
GAP, LINE, NARROWEST, WIDEST = 8, 18, 96, 256


def draw_refined(rows: Sequence[Sequence[Tensor]], columns: Sequence[str] = PAIRED) -> Tensor:
    """A sheet [H', W', 3]. ``rows``: for each row of the sheet, one image [3, S, S] in 0..1 per column."""
    side = min(max(rows[0][0].shape[-1], NARROWEST), WIDEST)
    sheet = Sheet(GAP + len(columns) * (side + GAP), 2 * GAP + LINE + len(rows) * (side + GAP))
    for k, name in enumerate(columns):
        sheet.text(GAP + k * (side + GAP), GAP, name)
    for i, row in enumerate(rows):
        for k, image in enumerate(row):
            sheet.paste(GAP + k * (side + GAP), GAP + LINE + i * (side + GAP), image.movedim(0, -1), side, side)
    return sheet.tensor()
