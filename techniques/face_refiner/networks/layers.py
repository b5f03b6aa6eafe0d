"""Layers that the image-to-image generators share: norms, dropout and blurs, under the names of the published state dicts.

``draws`` goes through all of them: None computes as eval() does, with running statistics and without dropout. A sequence of
torch.Generators on the CPU, one for each sample, computes as train() does for each sample alone, which is what pix2pix's
own test does with its batches of one: the statistics of the batch are the sample's, and dropout draws from its generator.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

Draws = Sequence[torch.Generator] | None

EPS = 1e-5  # of every norm


def instance_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Each channel of each sample with mean 0 and variance 1.

    As groups of one channel: torch's group norm keeps channels_last, its instance norm does not.
    """
    return F.group_norm(x, x.shape[1], weight, bias, EPS)


class InstanceNorm(nn.Module):
    """Without weights, as the published generators have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, draws: Draws = None) -> Tensor:
        return instance_norm(x)


class BatchNorm(nn.Module):
    """Its weights stay in float32, whatever comes in."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, draws: Draws = None) -> Tensor:
        names = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, var = (getattr(self, name).to(x.device, torch.float32) for name in names)
        if draws is not None:
            return instance_norm(x.float(), weight, bias).to(x.dtype)
        scale = weight * torch.rsqrt(var + EPS)
        shift = bias - mean * scale
        return torch.addcmul(shift.view(-1, 1, 1), x, scale.view(-1, 1, 1)).to(x.dtype)


def norm(kind: str, channels: int) -> nn.Module:
    return BatchNorm(channels) if kind == "batch" else InstanceNorm(channels)


class Dropout(nn.Module):
    """Half of the features, the rest doubled; drawn in the order of the layers, sample by sample."""

    def forward(self, x: Tensor, draws: Draws = None) -> Tensor:
        if draws is None:
            return x
        kept = [torch.rand(x.shape[1:], generator=generator) >= 0.5 for generator in draws]
        return x * torch.stack(kept).to(x) * 2.0


class Chain(nn.Sequential):
    """Layers one after the other, ``draws`` for those that know it."""

    def forward(self, input: Tensor, draws: Draws = None) -> Tensor:
        x = input
        for layer in self:
            x = layer(x, draws) if isinstance(layer, (InstanceNorm, BatchNorm, Dropout, Chain, Block)) else layer(x)
        return x


class Block(nn.Module):
    """A part with a skip connection; its ``forward`` takes ``draws``."""


class Blur(nn.Module):
    """Half the size after a blur by 1 2 1, both ways (CUT's antialiased generators)."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", filters((1.0, 2.0, 1.0), channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(x, self.filt.to(x), stride=2, groups=x.shape[1])


class BlurUp(nn.Module):
    """Twice the size, blurred by 1 3 3 1, both ways (CUT's antialiased generators)."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", 4.0 * filters((1.0, 3.0, 3.0, 1.0), channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return F.conv_transpose2d(x, self.filt.to(x), stride=2, padding=2, groups=x.shape[1])[..., 1:-1, 1:-1]


def filters(taps: Sequence[float], channels: int) -> Tensor:
    """[channels, 1, n, n] of sum 1 each."""
    row = torch.tensor(taps) / sum(taps)
    return repeat(torch.outer(row, row), "y x -> c 1 y x", c=channels).clone()


class ImageGenerator(nn.Module):
    """A network from pictures to pictures [B, 3, H, W], both -1..1 as published.

    Sides are multiples of ``multiple``, and at least ``least``. ``size`` is the side that it was made for, ``width`` the
    channels that it keeps at full size, by which memory is reckoned.
    """

    config: Any  # an image_generators.Config; that module imports this one
    multiple: int
    least: int
    size: int
    width: int

    def refine(self, pictures: Tensor, draws: Draws = None, dtype: torch.dtype | None = None) -> Tensor:
        """As ``forward`` for ``pictures`` with values 0..1; float32, with the layers computing in ``dtype``.

        What the network leaves as it is comes back bit for bit, which scaling to -1..1 and back would not give.
        """
        pictures = pictures.float()
        x = 2.0 * pictures - 1.0
        return pictures + 0.5 * (self(x, draws, dtype) - x)


def features(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What the layers compute on: channels_last, which convolutions of a CPU and of tensor cores want."""
    return x.to(dtype or x.dtype, memory_format=torch.channels_last)
