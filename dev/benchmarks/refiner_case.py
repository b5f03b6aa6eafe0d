"""Face refiner networks of the published sizes with random weights, their plain form, and images for them.

Needs only torch and einops.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...techniques.face_refiner.networks.image_generators import NETWORKS, Config
from ...techniques.face_refiner.networks.layers import EPS, BatchNorm, ImageGenerator, InstanceNorm
from ...techniques.face_refiner.networks.residual import RefinerConfig
from ...techniques.face_refiner.networks.resnet import ResnetConfig
from ...techniques.face_refiner.networks.unet import UnetConfig

CONFIGS = {"resnet9": ResnetConfig(), "unet256": UnetConfig(), "own": RefinerConfig()}
LEVEL = 1.0 / 255.0  # one level of an 8-bit image


def random_weights(config: Config) -> dict[str, Tensor]:
    """A state dict of ``config`` whose convolutions are random; the other weights are the initial ones."""
    generator, weights = torch.Generator().manual_seed(0), NETWORKS[type(config)](config).state_dict()
    for key, weight in weights.items():
        if weight.ndim == 4:
            scale = (1.5 / weight[0].numel()) ** 0.5
            weights[key] = torch.randn(weight.shape, generator=generator) * scale
    return weights


class PlainInstanceNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, eps=EPS)


class Plain(nn.Module):
    """A network of the pack with the layers of the published code. Input and output are images in 0..1."""

    def __init__(self, network: ImageGenerator, device: torch.device):
        super().__init__()
        for parent in list(network.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, InstanceNorm):
                    setattr(parent, name, PlainInstanceNorm())
                elif isinstance(layer, BatchNorm):
                    own = nn.BatchNorm2d(len(layer.weight), EPS)
                    own.load_state_dict(layer.state_dict(), strict=False)  # without torch's num_batches_tracked
                    setattr(parent, name, own)
        self.network, self.device = network.to(device).eval(), device

    def forward(self, images: Tensor) -> Tensor:
        x = 2.0 * images.to(self.device) - 1.0
        if isinstance(self.network.config, RefinerConfig):
            out = (x + self.network.change(x)).clamp(-1.0, 1.0)
        else:
            # does not call the network's forward(), because that changes the memory format
            out = torch.tanh(self.network.model(x))
        return (0.5 * out + 0.5).to(images.device)


def faces(batch: int, size: int) -> Tensor:
    """Images [batch, 3, size, size] in 0..1 of smooth shading and noise in place of faces, rounded to 8 bits."""
    generator = torch.Generator().manual_seed(0)
    shading = F.interpolate(torch.rand(batch, 3, 8, 8, generator=generator), (size, size), mode="bicubic")
    grain = 0.05 * torch.randn(shading.shape, generator=generator)
    return ((shading + grain).clamp(0.0, 1.0) / LEVEL).round() * LEVEL
