"""The independent evaluator: a small convolutional classifier of the concepts. It is trained independently of the
image-text encoder."""

import torch.nn.functional as F
from torch import Tensor, nn

from ....demo.concepts import load_concepts

CHANNELS = (16, 32, 64, 96)


class Block(nn.Module):
    """[B, C, H, W] -> [B, D, H/2, W/2]: a strided convolution, then a residual convolution."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.conv = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(8, out_channels), nn.GroupNorm(8, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(self.down(x)))
        return x + F.silu(self.norm2(self.conv(x)))


class ConceptClassifier(nn.Module):
    """Images [B, 3, H, W] in 0..1 -> logits [B, 80] in the order of concepts.json. Trained on images of 128 x 128
    pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(c, d) for c, d in zip((3, *CHANNELS), CHANNELS)))
        self.head = nn.Linear(CHANNELS[-1], len(load_concepts()))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(2 * images - 1).mean((2, 3)))
