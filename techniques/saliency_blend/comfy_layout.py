"""How a blend sees the sampler's latent: as an image [B, C, H, W] or a video [B, C, T, H, W].

ComfyUI samples a latent of several parts, such as a video and its audio, as one packed tensor [B, 1, N]. A blend
generates the first part, and the base generates the others. A latent with one axis of positions [B, C, L], such as that
of audio, is seen as an image of one row.
"""

from collections.abc import Sequence

import comfy.utils
from torch import Tensor

from ...common.shapes import size_of


def as_image(x: Tensor) -> Tensor:
    """[B, C, L] as [B, C, 1, L]; a latent with more axes is returned unchanged."""
    return x.unsqueeze(2) if x.ndim == 3 else x


class LatentLayout:
    """The layout of a latent. ``shapes``: those of its parts; one part means that the latent is not packed."""

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        self.shapes = shapes
        self.several = len(shapes) > 1

    def part(self, x: Tensor) -> Tensor:
        """The part of the latent ``x`` that the blend generates, its first: [B, C, *S] with at least two axes S."""
        return as_image(comfy.utils.unpack_latents(x, self.shapes)[0])

    def replaced(self, x: Tensor, part: Tensor) -> Tensor:
        """The latent ``x`` with ``part`` as its first part."""
        first = part.squeeze(2) if len(self.shapes[0]) == 3 else part
        if not self.several:
            return first
        return comfy.utils.pack_latents([first, *comfy.utils.unpack_latents(x, self.shapes)[1:]])[0]

    @property
    def note(self) -> str:
        """A note for the report of the run; empty if there is only one part."""
        if not self.several:
            return ""
        first, *others = (size_of(shape) for shape in self.shapes)
        return (
            f"the latent has several parts: the blend generates the first ({first}), such as a video, and the base the"
            f" others ({', '.join(others)}), such as its audio"
        )
