"""Layers shared by the image-to-image generators: norms, dropout and blurs, with the names of the published state dicts.

The argument ``generators`` of their forward() selects how norms and dropout compute:
- None: as in eval(), with running statistics and without dropout.
- A sequence of torch.Generators on the CPU, one per sample: as in train() with batches of one sample. pix2pix's test
  code computes in this way. Norms use the statistics of each sample, and each sample's dropout uses its generator.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

Generators = Sequence[torch.Generator] | None

EPS = 1e-5  # of every norm


def instance_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Normalises each channel of each sample to mean 0 and variance 1.

    Computed as a group norm with groups of one channel, which preserves channels_last; torch's instance norm does not.
    """
    return F.group_norm(x, x.shape[1], weight, bias, EPS)


class InstanceNorm(nn.Module):
    """Instance norm without weights, as in the published generators."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, generators: Generators = None) -> Tensor:
        return instance_norm(x)


class BatchNorm(nn.Module):
    """Batch norm in float32 for any dtype of the input."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, generators: Generators = None) -> Tensor:
        names = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, var = (getattr(self, name).to(x.device, torch.float32) for name in names)
        if generators is not None:
            return instance_norm(x.float(), weight, bias).to(x.dtype)
        scale = weight * torch.rsqrt(var + EPS)
        shift = bias - mean * scale
        return torch.addcmul(shift.view(-1, 1, 1), x, scale.view(-1, 1, 1)).to(x.dtype)


def norm(kind: str, channels: int) -> nn.Module:
    return BatchNorm(channels) if kind == "batch" else InstanceNorm(channels)


class Dropout(nn.Module):
    """Dropout with p = 0.5. All dropout layers draw their masks for a sample from that sample's generator, in turn."""

    def forward(self, x: Tensor, generators: Generators = None) -> Tensor:
        if generators is None:
            return x
        masks = [torch.rand(x.shape[1:], generator=generator) >= 0.5 for generator in generators]
        return x * torch.stack(masks).to(x) * 2.0


class Chain(nn.Sequential):
    """A Sequential that passes ``generators`` to the layers that take this argument."""

    def forward(self, input: Tensor, generators: Generators = None) -> Tensor:
        x = input
        for layer in self:
            x = (
                layer(x, generators)
                if isinstance(layer, (InstanceNorm, BatchNorm, Dropout, Chain, Block))
                else layer(x)
            )
        return x


class Block(nn.Module):
    """Base class of blocks whose ``forward`` takes ``generators``."""


class Blur(nn.Module):
    """Blurs with the filter 1 2 1 in both directions and halves the size (CUT's antialiased generators)."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", filters((1.0, 2.0, 1.0), channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(x, self.filt.to(x), stride=2, groups=x.shape[1])


class BlurUp(nn.Module):
    """Doubles the size and blurs with the filter 1 3 3 1 in both directions (CUT's antialiased generators)."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", 4.0 * filters((1.0, 3.0, 3.0, 1.0), channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return F.conv_transpose2d(x, self.filt.to(x), stride=2, padding=2, groups=x.shape[1])[..., 1:-1, 1:-1]


def filters(taps: Sequence[float], channels: int) -> Tensor:
    """Filters [channels, 1, n, n], each of sum 1."""
    row = torch.tensor(taps) / sum(taps)
    return repeat(torch.outer(row, row), "y x -> c 1 y x", c=channels).clone()


class ImageGenerator(nn.Module):
    """A network from images to images [B, 3, H, W], both in -1..1 as published.

    Sides must be multiples of ``multiple`` and at least ``min_side``. ``size``: side of the training images. ``width``:
    channels at full size; ``maps``: feature maps of that size in memory at once, on a CPU; both for memory estimates.
    """

    config: Any  # an image_generators.Config; not imported, since that module imports this one
    multiple: int
    min_side: int
    size: int
    width: int
    maps: int

    def refine(self, images: Tensor, generators: Generators = None, dtype: torch.dtype | None = None) -> Tensor:
        """``forward`` for ``images`` in 0..1. Returns float32; the layers compute in ``dtype``.

        Only the change is added to ``images``, so that unchanged values are exact. Scaling to -1..1 and back would
        round them.
        """
        images = images.float()
        x = 2.0 * images - 1.0
        return images + 0.5 * (self(x, generators, dtype) - x)


def features(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``x`` in ``dtype`` and channels_last, which is faster for convolutions on CPUs and tensor cores."""
    return x.to(dtype or x.dtype, memory_format=torch.channels_last)
