"""The expected score over the two settings that matter most, as an image."""

import numpy as np
from torch import Tensor

from ...common.sheets import FAINT, INK, Colour, Sheet
from ...common.tiles import font_size
from .tuning import Tuning
from .tuning_space import MovingSetting, Point, Space, in_one_line, shown

SIDE, LEFT, TOP, BELOW, RIGHT = 384, 96, 40, 56, 96  # of the field and of its margins, in pixels
CELL = 8  # side of the cells in which the estimate is drawn
POINT, FRAME = 7, 15  # sides of the marks of candidates and of the frame of the best one
# colours from the lowest (best) to the highest score, distinct in lightness for colour-blind readers
RAMP: tuple[Colour, ...] = ((253, 231, 37), (94, 201, 98), (33, 145, 140), (59, 82, 139), (68, 1, 84))


def colour_of(place: float) -> Colour:
    """The colour at ``place`` 0..1 of the ramp."""
    at = min(max(place, 0.0), 1.0) * (len(RAMP) - 1)
    k = min(int(at), len(RAMP) - 2)
    low, high = RAMP[k], RAMP[k + 1]
    r, g, b = (round(a + (at - k) * (c - a)) for a, c in zip(low, high))
    return r, g, b


def most_influential(space: Space, search: Tuning) -> list[int]:
    """The indices of the two settings on which the score depends most, in the order of ``space``; fewer if it has fewer."""
    lengths = search.model.lengths
    ranked = sorted(range(len(space)), key=lambda k: 0.0 if lengths is None else float(lengths[k]))
    return sorted(ranked[:2])


def draw_surface(space: Space, search: Tuning) -> Tensor:
    """Image [H', W', 3]: the expected score over the two settings of ``space`` that matter most, or over the only one.

    The other settings have their best values. The squares are all candidates, in the colours of their own expected
    scores; the framed one is the best.
    """
    sheet = Sheet(LEFT + SIDE + RIGHT, TOP + SIDE + BELOW)
    best = search.best
    if not space or best is None:
        sheet.text(LEFT, TOP, "no setting moved")
        return sheet.tensor()
    axes = most_influential(space, search)
    across, down = space[axes[0]], space[axes[1]] if len(axes) > 1 else None
    points = list(dict.fromkeys(trial.point for trial in [*search.screened, *search.trials]))
    at_points = search.estimates(points)[0]
    centres = (np.arange(SIDE // CELL) + 0.5) * CELL / SIDE
    grid = np.stack(np.meshgrid(centres, centres if down else [0.5], indexing="ij"), -1).reshape(-1, 2)
    rest = [k for k in range(len(space)) if k not in axes]
    cells: list[Point] = []
    for x, y in grid.tolist():
        cell = list(best.point)
        cell[axes[0]] = across.at(x)
        if down:
            cell[axes[1]] = down.at(y)
        cells.append(tuple(cell))
    at_cells = search.estimates(cells)[0]
    low, high = (float(f([f(at_points), f(at_cells)])) for f in (np.min, np.max))

    def level(score: float) -> float:
        return (score - low) / (high - low) if high > low else 0.0

    for (x, y), score in zip(grid.tolist(), at_cells.tolist(), strict=True):
        left = LEFT + round(x * SIDE - CELL / 2)
        top, height = (TOP + round((1 - y) * SIDE - CELL / 2), CELL) if down else (TOP, SIDE)
        sheet.box(left, top, CELL, height, colour_of(level(score)))

    def mark(point: Point, score: float, side: int, colour: Colour) -> None:
        """With a single setting, the height is the score."""
        up = down.place(point[axes[1]]) if down else 1.0 - level(score)
        x, y = LEFT + round(across.place(point[axes[0]]) * (SIDE - 1)), TOP + round((1 - up) * (SIDE - 1))
        sheet.box(x - side // 2, y - side // 2, side, side, colour)

    for point, score in zip(points, at_points.tolist(), strict=True):
        if point == best.point:
            mark(point, score, FRAME, INK)
        mark(point, score, POINT + 2, (0, 0, 0))
        mark(point, score, POINT, colour_of(level(score)))
    _draw_axes(sheet, across, down, low, high)
    text = "expected score, lower is better; framed: the best"
    if rest:
        text += f"; with {in_one_line(tuple(space[k] for k in rest), tuple(best.point[k] for k in rest))}"
    sheet.text(LEFT, 12, text, font_size(text, SIDE + RIGHT - 8))
    return sheet.tensor()


def _draw_axes(sheet: Sheet, across: MovingSetting, down: MovingSetting | None, low: float, high: float) -> None:
    bottom = TOP + SIDE
    sheet.text(LEFT, bottom + 28, across.title, 13)
    for value, where in ticks(across):
        text = shown(value)
        x = LEFT + round(where * SIDE) - Sheet.text_width(text, 11) // 2
        sheet.text(x, bottom + 8, text, 11, FAINT)
    if down:
        sheet.text(8, TOP - 20, down.title, font_size(down.title, LEFT - 16))
        for value, where in ticks(down):
            text = shown(value)
            sheet.text(LEFT - 8 - Sheet.text_width(text, 11), TOP + round((1 - where) * SIDE) - 6, text, 11, FAINT)
    else:
        sheet.text(8, TOP - 20, "score", 13)
    bar = LEFT + SIDE + 16
    for k in range(SIDE // CELL):
        share = (k + 0.5) * CELL / SIDE
        sheet.box(bar, TOP + k * CELL, 12, CELL, colour_of(share))
    for score, y in ((low, TOP - 4), (high, bottom - 10)):
        sheet.text(bar + 18, y, f"{score:.4f}", 11, FAINT)


def ticks(setting: MovingSetting) -> list[tuple[float | int | str, float]]:
    """Values with their places 0..1: the values of a list, or both ends and the middle of a range."""
    values = setting.values or tuple(setting.at(k / 2) for k in range(3))
    return [(value, setting.place(value)) for value in values]
