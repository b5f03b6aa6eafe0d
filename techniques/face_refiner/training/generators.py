"""Generators in training: architectures, weight initialisation and trainable batch norms.

Outside training, the generators' batch norms use running statistics or the statistics of each image. In training they
are replaced by ``TrainedBatchNorm``, which computes as torch's BatchNorm2d in train(). The names of the weights stay
the same.
"""

from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks.image_generators import NETWORKS, Config
from ..networks.layers import EPS, BatchNorm, Generators, ImageGenerator
from ..networks.residual import FaceRefinerNet, RefinerConfig
from ..networks.resnet import ResnetConfig
from ..networks.unet import UnetConfig

# the first is the pack's own; the others have the names and settings of pytorch-CycleGAN-and-pix2pix
ARCHITECTURES: dict[str, Config] = {
    "residual": RefinerConfig(),
    "resnet_9blocks": ResnetConfig(blocks=9),
    "resnet_6blocks": ResnetConfig(blocks=6),
    "unet_256": UnetConfig(downs=8),
    "unet_128": UnetConfig(downs=7),
}
SPREAD = 0.02  # standard deviation of initial weights in pytorch-CycleGAN-and-pix2pix
MOMENTUM = 0.1  # of running statistics

Network = TypeVar("Network", bound=nn.Module)


class TrainedBatchNorm(BatchNorm):
    """Batch norm that uses and tracks the statistics of the batch. Without ``generators`` it computes as BatchNorm."""

    def forward(self, x: Tensor, generators: Generators = None) -> Tensor:
        if generators is None:
            return super().forward(x)
        result = F.batch_norm(
            x.float(), self.running_mean, self.running_var, self.weight, self.bias, True, MOMENTUM, EPS
        )
        return result.to(x.dtype)


def with_trained_batch_norms(network: Network) -> Network:
    """Replaces each BatchNorm of ``network`` by a TrainedBatchNorm, enables gradients, and returns ``network``."""
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is BatchNorm:
                trained = TrainedBatchNorm(len(layer.weight)).to(layer.weight)
                trained.load_state_dict(layer.state_dict())
                setattr(parent, name, trained)
    return network.train().requires_grad_(True)


def generator_of(config: Config, weights: Mapping[str, Tensor]) -> ImageGenerator:
    """A generator of plain torch layers in float32, with copies of the ``weights``."""
    network = NETWORKS[type(config)](config)
    network.load_state_dict(weights)
    return network


def new_generator(config: Config, generator: torch.Generator) -> ImageGenerator:
    """An untrained generator. The pack's own architecture starts as the identity."""
    return initialise(NETWORKS[type(config)](config), generator)


@torch.no_grad()
def initialise(network: Network, generator: torch.Generator) -> Network:
    """Sets random initial weights and zero biases; returns ``network``.

    The networks of pytorch-CycleGAN-and-pix2pix start with weights from N(0, 0.02) and norm gains from N(1, 0.02), as
    in the published code. The pack's own refiner starts with weights that preserve the variance of the features; the
    weights of its last layer start at 0.
    """
    is_own = isinstance(network, FaceRefinerNet)
    for name, weight in network.named_parameters():
        if name.endswith("bias") or (is_own and name.startswith("conv_out.")):
            weight.zero_()
        elif weight.ndim == 1:
            weight.fill_(1.0) if is_own else weight.normal_(1.0, SPREAD, generator=generator)
        else:
            weight.normal_(0.0, weight[0].numel() ** -0.5 if is_own else SPREAD, generator=generator)
    return network
