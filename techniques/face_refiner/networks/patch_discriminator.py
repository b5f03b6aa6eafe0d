"""The discriminator of pix2pix and CycleGAN (arXiv 1611.07004, 1703.10593): each of its numbers rates 70 x 70 pixels.

Module names are those of the published state dicts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....common.operations import Operations
from .layers import Chain, Draws, norm

PATCH = 70  # pixels along a side that one number sees


@dataclass(frozen=True, kw_only=True)
class PatchDiscriminatorConfig:
    channels: int = 3  # 6 where a picture is rated beside the one that it was made of
    ndf: int = 64
    norm: str = "instance"


class PatchDiscriminator(nn.Module):
    least = 24  # pixels of a side: below that instance norm is left with one number

    def __init__(
        self, config: PatchDiscriminatorConfig = PatchDiscriminatorConfig(), operations: Operations = torch.nn
    ) -> None:
        super().__init__()
        self.config = config
        ndf, biased = config.ndf, config.norm != "batch"
        model = Chain(operations.Conv2d(config.channels, ndf, 4, 2, 1), nn.LeakyReLU(0.2, True))
        for channels, stride in ((ndf, 2), (2 * ndf, 2), (4 * ndf, 1)):
            model.append(operations.Conv2d(channels, 2 * channels, 4, stride, 1, bias=biased))
            model.append(norm(config.norm, 2 * channels))
            model.append(nn.LeakyReLU(0.2, True))
        model.append(operations.Conv2d(8 * ndf, 1, 4, 1, 1))
        self.model = model

    def forward(self, x: Tensor, draws: Draws = None) -> Tensor:
        """How real the patches of x [B, C, H, W] in -1..1 look: [B, 1, h, w] without limits, 1 or above 0 for real."""
        return self.model(x, draws)
