"""The patch discriminator of the autoencoder and the VQ-GAN (arXiv 1611.07004, section 3.2.2), with the hinge loss."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from .device import autocast, device


class PatchDiscriminator(nn.Module):
    """Images [B, 3, H, W] -> scores [B, 1, H/8, W/8] of overlapping patches."""

    def __init__(self, width=32):
        super().__init__()
        layers, last = [], 3
        for k in range(3):
            layers += [spectral_norm(nn.Conv2d(last, width << k, 4, 2, 1)), nn.LeakyReLU(0.2)]
            last = width << k
        self.net = nn.Sequential(*layers, spectral_norm(nn.Conv2d(last, 1, 3, 1, 1)))

    def forward(self, x):
        return self.net(x)


class Adversary:
    """The discriminator with its optimizer."""

    def __init__(self):
        self.network = PatchDiscriminator().to(device())
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=3e-4, betas=(0.5, 0.9))

    def loss(self, y, x):
        """The generator's hinge loss for generated images y [B, 3, H, W] in -1..1.

        Also trains the discriminator for one step, on y and the real images x.
        """
        self.network.requires_grad_(False)
        with autocast():
            found = -self.network(y).float().mean()
        self.network.requires_grad_(True)
        with autocast():
            real, generated = self.network(x).float(), self.network(y.detach()).float()
        (F.relu(1 - real).mean() + F.relu(1 + generated).mean()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return found

    def state_dict(self):
        return {"discriminator": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, found):
        self.network.load_state_dict(found["discriminator"])
        self.optimizer.load_state_dict(found["optimizer"])
