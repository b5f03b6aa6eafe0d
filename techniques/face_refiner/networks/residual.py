"""The pack's own face refiner: a residual U-Net with CBAM attention, after the description in arXiv 2505.02255.

The paper does not specify the sizes of the layers; those here are our choice. The output is z = clamp(x + U(x)) for an
image x and the U-Net U. The last layer of U is initialised to zero, so that an untrained refiner changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....common.operations import Operations
from ....common.weights import count, shape_of
from .layers import Generators, ImageGenerator, features

NETWORK = "the pack's face refiner"
CHANNELS_PER_GROUP = 8
SPATIAL = 7  # side of the spatial gate's convolution


@dataclass(frozen=True, kw_only=True)
class RefinerConfig:
    widths: tuple[int, ...] = (32, 64, 128, 192)  # channels at each scale; each scale halves the image size
    blocks: tuple[int, ...] = (1, 1, 1, 2)  # residual blocks per scale of the encoder; the decoder has one per scale
    reduction: int = 16  # factor by which the channel gate reduces the channels

    def __str__(self) -> str:
        return f"residual U-Net with CBAM, widths {', '.join(map(str, self.widths))}"

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> "RefinerConfig":
        def shape(name: str) -> torch.Size:
            return shape_of(state_dict, name, 4, NETWORK)

        scales = range(max(1, count(state_dict, "down.")))
        # the reduction is computed from the deepest scale, where rounding matters least
        squeezed, channels = shape(f"down.{scales[-1]}.0.attention.squeeze.weight")[:2]
        return cls(
            widths=tuple(shape(f"down.{i}.0.conv1.weight")[0] for i in scales),
            blocks=tuple(count(state_dict, f"down.{i}.") for i in scales),
            reduction=max(1, channels // squeezed),
        )


class CBAM(nn.Module):
    """Channel, then spatial attention (arXiv 1807.06521): x · σ(MLP(mean) + MLP(max)), then · σ(conv([mean; max])).

    ``skip`` has the same shape as x. One fused operation computes the last product and adds it to ``skip``.
    """

    def __init__(self, channels: int, reduction: int, operations: Operations) -> None:
        super().__init__()
        squeezed = max(1, channels // reduction)
        self.squeeze = operations.Conv2d(channels, squeezed, 1)
        self.excite = operations.Conv2d(squeezed, channels, 1)
        self.spatial = operations.Conv2d(2, 1, SPATIAL, padding=SPATIAL // 2)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        # adaptive_max_pool2d instead of amax, which takes over ten times as long in bfloat16 on a CPU
        pooled = torch.cat([x.mean((2, 3), keepdim=True), F.adaptive_max_pool2d(x, 1)])
        mean, most = self.excite(F.relu(self.squeeze(pooled))).chunk(2)
        x = x * torch.sigmoid(mean + most)
        gate = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return torch.addcmul(skip, x, torch.sigmoid(self.spatial(gate)))


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, reduction: int, operations: Operations) -> None:
        super().__init__()
        groups = max(1, channels // CHANNELS_PER_GROUP)
        self.norm1 = operations.GroupNorm(groups, channels)
        self.conv1 = operations.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = operations.GroupNorm(groups, channels)
        self.conv2 = operations.Conv2d(channels, channels, 3, padding=1)
        self.attention = CBAM(channels, reduction, operations)

    def forward(self, x: Tensor) -> Tensor:
        # in place: allocating memory is slow on a CPU
        y = self.norm2(self.conv1(F.silu(self.norm1(x), inplace=True)))
        return self.attention(self.conv2(F.silu(y, inplace=True)), x)


class FaceRefinerNet(ImageGenerator):
    size, maps = 256, 6

    def __init__(self, config: RefinerConfig = RefinerConfig(), operations: Operations = torch.nn) -> None:
        super().__init__()
        self.config, self.width = config, config.widths[0]
        self.multiple = self.min_side = 2 ** (len(config.widths) - 1)
        widths = config.widths

        def blocks(channels: int, number: int) -> nn.Sequential:
            return nn.Sequential(*(ResidualBlock(channels, config.reduction, operations) for _ in range(number)))

        pairs = list(pairwise(widths))
        self.conv_in = operations.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(blocks(*sizes) for sizes in zip(widths, config.blocks))
        self.halve = nn.ModuleList(operations.Conv2d(wide, deep, 3, 2, 1) for wide, deep in pairs)
        self.narrow = nn.ModuleList(operations.Conv2d(deep, wide, 1) for wide, deep in pairs)
        self.merge = nn.ModuleList(operations.Conv2d(2 * wide, wide, 3, padding=1) for wide in widths[:-1])
        self.up = nn.ModuleList(blocks(wide, 1) for wide in widths[:-1])
        self.conv_out = operations.Conv2d(widths[0], 3, 3, padding=1)
        for weight in self.conv_out.parameters():
            nn.init.zeros_(weight)

    def forward(self, x: Tensor, generators: Generators = None, dtype: torch.dtype | None = None) -> Tensor:
        # added in the dtype of the image: bfloat16 is coarser than 8 bits
        return (x + self.change(features(x, dtype)).to(x.dtype)).clamp(-1.0, 1.0)

    def change(self, x: Tensor) -> Tensor:
        """U(x)."""
        x, skips = self.conv_in(x), []
        for i, blocks in enumerate(self.down):
            x = blocks(self.halve[i - 1](x) if i else x)
            skips.append(x)
        skips.pop()
        for i in reversed(range(len(self.up))):  # no name holds a feature map for longer than needed
            x = torch.cat([skips.pop(), F.interpolate(self.narrow[i](x), scale_factor=2.0, mode="nearest")], 1)
            x = self.merge[i](x)
            x = self.up[i](x)
        return self.conv_out(F.silu(x))
