"""A noise that is composed of two noises with a mask."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy.nested_tensor import NestedTensor
from torch import Tensor

from ...common.heat import resized
from ...common.masks import check_count
from ...common.shapes import size_of
from ...host.sampled_latents import parts_of
from .comfy_files import Noise, SeedNoise


@dataclass(frozen=True, eq=False)
class CombinedNoise:
    """``noise`` where ``mask`` [M, H, W] is at least ``threshold``, and ``other`` elsewhere. M: 1, or the batch size.

    A saved noise of one image serves all images of a batch. The mask applies to all channels and frames. The sound of a
    video with audio has ``noise``.
    """

    noise: Noise
    other: Noise
    mask: Tensor
    threshold: float

    def __post_init__(self) -> None:
        if self.mask.ndim not in (2, 3, 4):
            raise ValueError(
                f"expected a mask [batch, height, width], got the size {size_of(self.mask) or 'of one number'}; connect a mask"
            )
        if not bool(torch.isfinite(self.mask).all()):
            raise ValueError("the mask is not finite (NaN or infinite); connect another mask")

    @property
    def seed(self) -> int:
        return self.noise.seed

    def generate_noise(self, latent: Mapping[str, Any]) -> Tensor | NestedTensor:
        """The noise for a LATENT; a ValueError if one of the two noises does not fit it."""
        first, second = (parts_of(_for_batch(noise, latent)) for noise in (self.noise, self.other))
        if [part.shape for part in first] != [part.shape for part in second]:
            sizes = (" and ".join(size_of(part) for part in parts) for parts in (first, second))
            raise ValueError("noise has the size {}, other {}; use noises for the same latent".format(*sizes))
        if first[0].ndim < 4:
            raise ValueError(
                f"expected a noise with height and width, got {size_of(first[0])}; use an image or video model"
            )
        masks = self.mask.reshape(-1, *self.mask.shape[-2:]).float().cpu()
        check_count(len(masks), len(first[0]))
        kept = torch.stack([resized(mask, tuple(first[0].shape[-2:])) for mask in masks]) >= self.threshold
        kept = kept.reshape(len(masks), *[1] * (first[0].ndim - 3), *kept.shape[1:])
        parts = [torch.where(kept, first[0], second[0]), *first[1:]]
        return parts[0] if len(parts) == 1 else NestedTensor(parts)


def _for_batch(noise: Noise, latent: Mapping[str, Any]) -> Tensor | NestedTensor:
    """The noise for ``latent``; a saved noise of one image is repeated for each image of a batch."""
    samples = latent["samples"]
    rows = len(parts_of(samples)[0])
    if not isinstance(noise, SeedNoise) or rows == 1 or len(parts_of(noise.noise)[0]) != 1:
        return noise.generate_noise(dict(latent))
    one = [part[:1] for part in parts_of(samples)]
    drawn = noise.generate_noise({**latent, "samples": one[0] if len(one) == 1 else NestedTensor(one)})
    repeated = [part.repeat(rows, *[1] * (part.ndim - 1)) for part in parts_of(drawn)]
    return repeated[0] if len(repeated) == 1 else NestedTensor(repeated)
