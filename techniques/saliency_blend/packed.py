"""Latents of several parts, such as a video and its audio. ComfyUI samples them as one packed tensor [B, 1, N].

A blend generates the first part, the video or image. The base generates the others.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class PackedLatent:
    """The layout of a latent. ``shapes``: those of its parts; one part means that the latent is not packed."""

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        self.first = tuple(shapes[0])  # [B, C, *S]
        self.several = len(shapes) > 1

    def part(self, x: Tensor) -> Tensor:
        """The first part [B, C, *S] of the latent ``x``; ``x`` itself if it has only one part."""
        if not self.several:
            return x
        return x[:, :, : math.prod(self.first[1:])].reshape(len(x), *self.first[1:])

    def replaced(self, x: Tensor, part: Tensor) -> Tensor:
        """The latent ``x`` with ``part`` as its first part."""
        if not self.several:
            return part
        return torch.cat([part.reshape(len(part), 1, -1), x[:, :, math.prod(self.first[1:]) :]], 2)

    @property
    def note(self) -> str:
        """A note for the report of the run; empty if there is only one part."""
        if not self.several:
            return ""
        return "the latent has several parts: the blend generates the first (a video), and the base the others (audio)"
