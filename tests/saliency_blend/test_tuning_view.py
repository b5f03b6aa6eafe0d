"""The image of the expected scores."""

import numpy as np
import pytest
import torch

from chorus.techniques.saliency_blend.tuning import Tuning, plan_tuning
from chorus.techniques.saliency_blend.tuning_space import Limits, read_space
from chorus.techniques.saliency_blend.tuning_view import (
    LEFT,
    RAMP,
    SIDE,
    TOP,
    colour_of,
    draw_surface,
    most_influential,
)

LIMITS = {"bias": Limits(-5.0, 5.0, 0.05), "blur": Limits(1, 64, 1, whole=True), "softness": Limits(0.0, 4.0, 0.05)}


def searched(text, start, score):
    space = read_space(text, ["a"], LIMITS)
    search = Tuning(space, start, plan_tuning(40, 20, 2), lambda point, steps, seeds: [score(point)] * len(seeds))
    search.run()
    return space, search


def nearest(sheet, x, y):
    """The index in RAMP of the colour nearest to that at (x, y) of the field, 0..1 to the right and upwards."""
    row, column = TOP + round((1 - y) * (SIDE - 1)), LEFT + round(x * (SIDE - 1))
    found = sheet[row, column] * 255
    return int((found - torch.tensor(RAMP)).norm(dim=1).argmin())


def test_ends_of_the_ramp_are_the_best_and_the_worst():
    assert colour_of(0.0) == RAMP[0]
    assert colour_of(1.0) == colour_of(2.0) == RAMP[-1]


def test_axes_are_the_settings_that_matter_most():
    text = "blur = 1 | 4\nbias = -1 to 1\nsoftness = 0 to 4"
    space, search = searched(text, (4, 0.0, 2.0), lambda p: 0.5 + 0.2 * np.sin(6 * p[1]) - 0.1 * (p[2] - 2) ** 2)
    assert most_influential(space, search) == [1, 2]


def test_low_scores_are_bright_where_the_settings_score_best():
    text = "bias = -1 to 1\nsoftness = 0 to 4\nblur = 1 | 4"
    # lowest at bias -1 and softness 4: at the upper left
    space, search = searched(text, (0.0, 2.0, 4), lambda p: 0.5 + 0.2 * p[0] - 0.1 * p[1])
    sheet = draw_surface(space, search)
    assert nearest(sheet, 0.02, 0.97) < nearest(sheet, 0.5, 0.5) < nearest(sheet, 0.98, 0.03)


@pytest.mark.parametrize("text", ["bias = -1 to 1", "blur = 1 | 2 | 4", "bias = -1 | 1\nblur = 1 | 4"])
def test_one_setting_lists_and_equal_scores_are_drawn(text):
    start = (0.0, 4)[: len(text.splitlines())] if "bias" in text else (4,)
    for score in (lambda p: float(p[0]), lambda p: 0.5):
        space, search = searched(text, start, score)
        sheet = draw_surface(space, search)
        assert torch.isfinite(sheet).all()
        assert sheet.unique().numel() > 10


def test_space_without_settings_is_said():
    search = Tuning((), (), plan_tuning(4, 20, 2), lambda point, steps, seeds: [0.5] * len(seeds))
    search.run()
    assert torch.isfinite(draw_surface((), search)).all()
