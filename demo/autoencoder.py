"""The autoencoder of the demo checkpoints: latents with 8 channels, downscaled by 8.

The encoder and the decoder are each the sum of two branches: a linear map of 8 x 8 patches, and convolutions. Training
initializes the linear map with the exact PCA and the output of the convolutions to zero (dev/recipes/pca.py). So
training starts from the best linear encoding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH, CHANNELS = 8, 8


class ResidualBlock(nn.Module):
    """[B, C, H, W] -> the same shape. Training initializes the second convolution to zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Encoder(nn.Module):
    """Images [B, 3, H, W] in -1..1 -> latents [B, 8, H/8, W/8]."""

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 96)) -> None:
        super().__init__()
        a, b, c = widths
        self.linear = nn.Conv2d(3, CHANNELS, PATCH, stride=PATCH)
        self.net = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * 3, a, 3, padding=1),
            nn.SiLU(),
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * a, b, 3, padding=1),
            ResidualBlock(b),
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * b, c, 3, padding=1),
            ResidualBlock(c),
            nn.SiLU(),
            nn.Conv2d(c, CHANNELS, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.net(x)


class Decoder(nn.Module):
    """Latents [B, 8, h, w] -> images [B, 3, 8h, 8w] in about -1..1."""

    def __init__(self, widths: tuple[int, int, int] = (128, 80, 40)) -> None:
        super().__init__()
        a, b, c = widths
        self.linear = nn.ConvTranspose2d(CHANNELS, 3, PATCH, stride=PATCH, bias=False)
        self.mean = nn.Parameter(torch.zeros(3, PATCH, PATCH))
        self.net = nn.Sequential(
            nn.Conv2d(CHANNELS, a, 3, padding=1),
            ResidualBlock(a),
            ResidualBlock(a),
            nn.Conv2d(a, 4 * b, 3, padding=1),
            nn.PixelShuffle(2),
            ResidualBlock(b),
            ResidualBlock(b),
            nn.Conv2d(b, 4 * c, 3, padding=1),
            nn.PixelShuffle(2),
            ResidualBlock(c),
            nn.SiLU(),
            nn.Conv2d(c, 4 * 3, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z) + self.mean.repeat(1, *z.shape[-2:]) + self.net(z)


class Autoencoder(nn.Module):
    """Encodes images [B, 3, H, W] in -1..1 to latents [B, 8, H/8, W/8] with mean 0 and variance 1 per channel, and decodes
    them. ``shift`` and ``scale`` [8] are the mean and standard deviation of the trained encoder's output."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()
        self.register_buffer("shift", torch.zeros(CHANNELS))
        self.register_buffer("scale", torch.ones(CHANNELS))

    def encode(self, x: Tensor) -> Tensor:
        return (self.encoder(x) - self.shift.view(-1, 1, 1)) / self.scale.view(-1, 1, 1)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z * self.scale.view(-1, 1, 1) + self.shift.view(-1, 1, 1))

    def preview_factors(self) -> tuple[list[list[float]], list[float]]:
        """(factors [8, 3], bias [3]) for ComfyUI's latent2rgb previews. They map a latent to the mean colour of its
        linearly decoded patch, in -1..1."""
        mean = self.decoder.linear.weight.mean((2, 3))
        factors = self.scale[:, None] * mean
        return factors.tolist(), (self.decoder.mean.mean((1, 2)) + self.shift @ mean).tolist()
