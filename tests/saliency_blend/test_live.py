"""Masks of a running blend: how often they are shown, and their images."""

import numpy as np
import pytest
import torch

from chorus.common.host_copy import HostCopy
from chorus.common.sheets import model_colour
from chorus.techniques.saliency_blend import live
from chorus.techniques.saliency_blend.live import INTERVAL, LONGEST, LiveMasks, mask_image, mask_of_sample
from chorus.techniques.saliency_blend.trace import BlendStep
from chorus.techniques.saliency_blend.view import colour_shares


def pixels(image):
    return np.asarray(image.convert("RGB"))


class Display:
    """LiveMasks with a clock that the test sets; ``shown``: (time, image) pairs."""

    def __init__(self, is_watched=lambda: True):
        self.now, self.shown = 100.0, []
        self.masks = LiveMasks(lambda image: self.shown.append((self.now, pixels(image))), is_watched, lambda: self.now)

    def run(self, seconds, steps, shape=(1, 4, 4)):
        """Take steps of this duration. The mask of step n has n positions of the expert."""
        for n in range(steps):
            weights = (torch.arange(16) < n).view(4, 4).expand(shape).to(torch.uint8)
            self.masks(BlendStep(1.0, (0, 1), weights), shape)
            self.now += seconds

    @property
    def gaps(self):
        times = [time for time, _ in self.shown]
        return np.diff(times)

    def owned(self, index):
        """Number of positions of the expert in an image."""
        image = self.shown[index][1]
        return int((image == model_colour(1)).all(-1).sum() // (LONGEST // 4) ** 2)


@pytest.fixture
def gpu_display(monkeypatch):
    """A display for a GPU, whose copies are complete only in a later step: they are queued behind the step's kernels."""
    display = Display()

    class LaterCopy(HostCopy):
        def __init__(self, values):
            super().__init__(values)
            self.began = display.now

        @property
        def is_complete(self):
            return display.now > self.began

    monkeypatch.setattr(live, "HostCopy", LaterCopy)
    return display


@pytest.mark.parametrize("seconds", [0.001, 0.02, 0.1, 0.3])
def test_at_most_four_images_a_second(seconds):
    display = Display()
    display.run(seconds, steps=15)
    assert display.gaps.size == 0 or display.gaps.min() >= INTERVAL - 1e-9
    assert len(display.shown) == 1 + int(14 * seconds / max(seconds, np.ceil(INTERVAL / seconds) * seconds) + 1e-9)


@pytest.mark.parametrize("durations", [[0.4, 0.01, 0.01, 0.3, 0.01, 0.5], [0.26, 0.02] * 4])
def test_irregular_steps_with_delayed_copies_keep_the_interval(durations, gpu_display):
    for seconds in durations * 3:
        gpu_display.run(seconds, steps=1)
    assert len(gpu_display.shown) > 3
    assert gpu_display.gaps.min() >= INTERVAL - 1e-9


def test_slow_steps_are_all_shown_each_one_step_later(gpu_display):
    gpu_display.run(2.0, steps=5)
    assert [gpu_display.owned(i) for i in range(len(gpu_display.shown))] == [0, 1, 2, 3]
    gpu_display.masks.finish()
    assert [gpu_display.owned(i) for i in range(len(gpu_display.shown))] == [0, 1, 2, 3, 4]


def test_steps_between_two_images_copy_nothing(monkeypatch):
    copies = []
    monkeypatch.setattr(live, "HostCopy", lambda values: copies.append(values) or HostCopy(values))
    Display().run(0.01, steps=15)
    assert len(copies) == 1


def test_nothing_is_copied_without_a_viewer(monkeypatch):
    monkeypatch.setattr(live, "HostCopy", lambda values: pytest.fail("copied"))
    display = Display(is_watched=lambda: False)
    display.run(1.0, steps=3)
    display.masks.finish()
    assert not display.shown


def test_last_mask_is_shown_once_at_the_end():
    display = Display()
    display.run(0.01, steps=9)
    display.masks.finish()
    assert [display.owned(i) for i in range(2)] == [0, 8]
    display.masks.finish()
    assert len(display.shown) == 2
    slow = Display()
    slow.run(1.0, steps=3)
    slow.masks.finish()
    assert len(slow.shown) == 3


def test_run_without_a_step_shows_nothing():
    display = Display()
    display.masks.finish()
    assert not display.shown


def test_colours_are_those_of_the_models_that_took_part():
    mask = torch.tensor([[0, 1, 2]], dtype=torch.uint8)
    image = pixels(mask_image(mask, (0, 2, 5)))
    assert image.shape == (42, 126, 3)
    assert [tuple(image[21, x]) for x in (21, 63, 105)] == [model_colour(i) for i in (0, 2, 5)]


def test_soft_mask_mixes_the_colours_as_the_view_does():
    weights = torch.rand(3, 2, 8, 8).softmax(0)
    mask = mask_of_sample(BlendStep(1.0, (0, 1, 2), weights), (2, 8, 8))
    expected = 255 * colour_shares(weights[:, 0]).numpy()
    assert np.abs(pixels(mask_image(mask, (0, 1, 2)))[8::16, 8::16] - expected).max() <= 0.51


def test_first_sample_and_middle_frame_are_shown():
    weights = torch.zeros(2, 5, 4, 6, dtype=torch.uint8)
    weights[0, 2] = 1
    step = BlendStep(1.0, (0, 1), weights)
    assert mask_of_sample(step, weights.shape).tolist() == [[1] * 6] * 4
    soft = torch.stack([weights == i for i in range(2)]).float()
    assert mask_of_sample(BlendStep(1.0, (0, 1), soft), weights.shape)[1].tolist() == [[1.0] * 6] * 4


@pytest.mark.parametrize("shape", [(1, 4, 6), (2, 3, 4, 6)])
def test_step_of_the_base_alone_is_grey(shape):
    image = pixels(mask_image(mask_of_sample(BlendStep(1.0, (0,), None), shape), (0,)))
    assert image.shape == (84, 126, 3)
    assert (image == model_colour(0)).all()


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(64, 64, (128, 128)), (12, 16, (96, 128)), (96, 64, (96, 64)), (128, 72, (128, 72)), (300, 200, (100, 67))],
)
def test_image_has_at_most_128_pixels_along_a_side(height, width, expected):
    weights = torch.zeros(1, height, width, dtype=torch.uint8)
    mask = mask_of_sample(BlendStep(1.0, (0, 1), weights), weights.shape)
    assert mask_image(mask, (0, 1)).size == expected[::-1]
