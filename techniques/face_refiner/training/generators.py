"""Generators in training: which there are, their first weights, and batch norms that learn.

The generators' own batch norms compute as a head in use does: with running statistics, or with those of each picture alone.
In training they are exchanged for ``TrainedBatchNorm``, which does what torch's BatchNorm2d does in train(); the weights keep
their names.
"""

from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks.image_generators import NETWORKS, Config
from ..networks.layers import EPS, BatchNorm, Draws, ImageGenerator
from ..networks.residual import FaceRefinerNet, RefinerConfig
from ..networks.resnet import ResnetConfig
from ..networks.unet import UnetConfig

# names as in pytorch-CycleGAN-and-pix2pix, with what it trains them with; the first is the pack's own
ARCHITECTURES: dict[str, Config] = {
    "residual": RefinerConfig(),
    "resnet_9blocks": ResnetConfig(blocks=9),
    "resnet_6blocks": ResnetConfig(blocks=6),
    "unet_256": UnetConfig(downs=8),
    "unet_128": UnetConfig(downs=7),
}
SPREAD = 0.02  # of the originals' first weights
MOMENTUM = 0.1  # of running statistics

Network = TypeVar("Network", bound=nn.Module)


class TrainedBatchNorm(BatchNorm):
    """With ``draws`` the statistics are the batch's, and the running ones follow them; without, as in use."""

    def forward(self, x: Tensor, draws: Draws = None) -> Tensor:
        if draws is None:
            return super().forward(x)
        found = F.batch_norm(
            x.float(), self.running_mean, self.running_var, self.weight, self.bias, True, MOMENTUM, EPS
        )
        return found.to(x.dtype)


def with_trained_batch_norms(network: Network) -> Network:
    """``network`` itself, its batch norms exchanged for TrainedBatchNorm, open to gradients."""
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is BatchNorm:
                trained = TrainedBatchNorm(len(layer.weight)).to(layer.weight)
                trained.load_state_dict(layer.state_dict())
                setattr(parent, name, trained)
    return network.train().requires_grad_(True)


def generator_of(config: Config, weights: Mapping[str, Tensor]) -> ImageGenerator:
    """A generator of plain layers in float32 with copies of these weights."""
    network = NETWORKS[type(config)](config)
    network.load_state_dict(weights)
    return network


def new_generator(config: Config, draws: torch.Generator) -> ImageGenerator:
    """An untrained generator; the pack's own changes nothing yet."""
    return initialise(NETWORKS[type(config)](config), draws)


@torch.no_grad()
def initialise(network: Network, draws: torch.Generator) -> Network:
    """First weights from ``draws``: of the originals N(0, 0.02), gains N(1, 0.02); of the pack's own such that every
    layer keeps the size of what comes in, and the last gives nothing. Biases are 0."""
    own = isinstance(network, FaceRefinerNet)
    for name, weight in network.named_parameters():
        if name.endswith("bias") or (own and name.startswith("conv_out.")):
            weight.zero_()
        elif weight.ndim == 1:
            weight.fill_(1.0) if own else weight.normal_(1.0, SPREAD, generator=draws)
        else:
            weight.normal_(0.0, weight[0].numel() ** -0.5 if own else SPREAD, generator=draws)
    return network
