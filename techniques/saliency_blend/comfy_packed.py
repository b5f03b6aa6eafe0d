"""Latents of several parts, such as a video and its audio. ComfyUI samples them as one packed tensor [B, 1, N].

A blend generates the first part, the video or image. The base generates the others.
"""

from collections.abc import Sequence

import comfy.utils
from torch import Tensor


class PackedLatent:
    """The layout of a latent. ``shapes``: those of its parts; one part means that the latent is not packed."""

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        self.shapes = shapes
        self.several = len(shapes) > 1

    def part(self, x: Tensor) -> Tensor:
        """The first part [B, C, *S] of the latent ``x``; ``x`` itself if it has only one part."""
        return comfy.utils.unpack_latents(x, self.shapes)[0]

    def replaced(self, x: Tensor, part: Tensor) -> Tensor:
        """The latent ``x`` with ``part`` as its first part."""
        if not self.several:
            return part
        return comfy.utils.pack_latents([part, *comfy.utils.unpack_latents(x, self.shapes)[1:]])[0]

    @property
    def note(self) -> str:
        """A note for the report of the run; empty if there is only one part."""
        if not self.several:
            return ""
        return "the latent has several parts: the blend generates the first (a video), and the base the others (audio)"
