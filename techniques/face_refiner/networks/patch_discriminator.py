"""The discriminator of pix2pix and CycleGAN (arXiv 1611.07004, 1703.10593): each output scores 70 x 70 pixels.

Module names are those of the published state dicts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....common.operations import Operations
from .layers import Chain, Generators, norm

PATCH = 70  # receptive field of one output, in pixels along a side


@dataclass(frozen=True, kw_only=True)
class PatchDiscriminatorConfig:
    channels: int = 3  # 6 for an image concatenated with its source
    ndf: int = 64
    norm: str = "instance"


class PatchDiscriminator(nn.Module):
    min_side = 24  # pixels; at a smaller side, an instance norm would receive a single value per channel

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

    def forward(self, x: Tensor, generators: Generators = None) -> Tensor:
        """Scores [B, 1, h, w] of the patches of x [B, C, H, W] in -1..1.

        Scores are unbounded. For a real patch the score should be 1 (LSGAN) or above 0 (if used as a logit).
        """
        return self.model(x, generators)
