"""Small images of a blend's mask, shown while the blend samples."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...common.host_copy import HostCopy
from ...common.sheets import model_colour
from .trace import BlendStep, shown

INTERVAL = 0.25  # least seconds between two images
LONGEST = 128  # longest side of an image in pixels


def mask_of_sample(step: BlendStep, shape: Sequence[int]) -> Tensor:
    """The mask of the first sample: indices [H, W] into ``step.models``, or weights [len(step.models), H, W].

    ``shape``: (B, *S), the size of the latent without channels. Of a video it is the mask of the middle frame, as in
    SaliencyBlendView. Of a mask with more than ``LONGEST`` positions along a side, every second (third, ...) is taken.
    The result is on the device of the step's weights.
    """
    weights = step.weights
    if weights is None:  # no expert took part: the base generates everything
        mask = torch.zeros(tuple(shape[1:]), dtype=torch.uint8)
    else:
        mask = weights[0] if weights.dtype == torch.uint8 else weights[:, 0]
    if len(shape) == 4:
        mask = mask.select(-3, shape[1] // 2)
    mask = shown(mask)
    stride = -(-max(shape[-2:]) // LONGEST)
    return mask[..., stride // 2 :: stride, stride // 2 :: stride]


def mask_image(mask: Tensor, models: Sequence[int]) -> Image.Image:
    """The image of a ``mask`` from ``mask_of_sample``, on the CPU, with each of ``models`` in its colour.

    It is enlarged by a whole number, so that all positions of the latent have the same size. The image of a hard mask
    has a palette (mode P): it is encoded several times faster than an image in RGB.
    """
    palette = np.array([model_colour(i) for i in models], dtype=np.uint8)
    if mask.dtype == torch.uint8:
        image = Image.fromarray(mask.numpy())
        image.putpalette(palette.tobytes())
    else:
        mixed = np.tensordot(mask.float().numpy(), palette.astype(np.float32), (0, 0))
        image = Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))
    scale = max(1, LONGEST // max(image.size))
    return image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)


class LiveMasks:
    """Shows the masks of one run: at most one image in ``INTERVAL`` seconds, and at the end that of the last step.

    Call it with every step. A step without an image costs one look at the clock. On a GPU, a step only starts the
    copy of its mask to the host, and a later step shows it, so that sampling never waits for the copy.

    ``show`` receives the images. ``is_watched``: whether anyone sees them now; without a viewer nothing is copied.
    """

    def __init__(
        self,
        show: Callable[[Image.Image], None],
        is_watched: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._show, self._is_watched, self._clock = show, is_watched, clock
        self._next_copy = self._next_image = float("-inf")
        self._copy: tuple[HostCopy, BlendStep] | None = None  # a copy that is not shown yet
        self._last: tuple[BlendStep, Sequence[int]] | None = None
        self._shown: BlendStep | None = None

    def __call__(self, step: BlendStep, shape: Sequence[int]) -> None:
        """Receive a step of a run on a latent of the size ``shape`` = (B, *S)."""
        self._last = step, shape
        now = self._clock()
        self._show_copy(now)  # the one that an earlier step started
        if now >= self._next_copy and self._is_watched():
            self._next_copy = now + INTERVAL
            self._copy = HostCopy(mask_of_sample(step, shape)), step
            self._show_copy(now)  # on the CPU the copy is complete at once

    def _show_copy(self, now: float) -> None:
        """Show the mask whose copy is complete, if there is one and the last image is old enough."""
        if self._copy is None or now < self._next_image or not self._copy[0].is_complete:
            return
        (values, step), self._copy = self._copy, None
        self._next_image = now + INTERVAL
        self._show_values(values, step)

    def _show_values(self, values: HostCopy, step: BlendStep) -> None:
        self._shown = step
        self._show(mask_image(values.tensor(), step.models))

    def finish(self) -> None:
        """Show the mask of the last step, unless it is already shown. Call it at the end of a finished run."""
        if self._last is None or self._last[0] is self._shown or not self._is_watched():
            return
        step, shape = self._last
        self._copy = None
        self._show_values(HostCopy(mask_of_sample(step, shape)), step)
