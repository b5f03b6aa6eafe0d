"""Initial weights of the autoencoder: the PCA of image patches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...demo.autoencoder import CHANNELS, PATCH, Autoencoder, ResidualBlock


@torch.no_grad()
def start_as_pca(model: Autoencoder, images: Tensor) -> float:
    """Initialise an autoencoder with the PCA of the patches of ``images`` [B, 3, H, W] in -1..1.

    The linear branches become the PCA, and the convolutional branches output zero.

    Channels with a larger variance in the PCA have a larger variance in the latent, so that a denoiser spends less
    capacity on fine detail: a channel's standard deviation is the fourth root of its variance in the PCA, scaled so
    that the latent's mean variance is 1. Returns the share of the variance that the latent retains.
    """
    basis, mean, scale, kept = principal_components(images, PATCH, CHANNELS)
    encoder, decoder = model.encoder, model.decoder
    weight, bias = encoder.linear.parameters()
    weight.copy_((basis * scale[:, None]).view(CHANNELS, 3, PATCH, PATCH))
    bias.copy_(-(basis @ mean) * scale)
    decoder.linear.weight.copy_((basis / scale[:, None]).view(CHANNELS, 3, PATCH, PATCH))
    decoder.mean.copy_(mean.view(3, PATCH, PATCH))
    for net in (encoder.net, decoder.net):
        for block in net.modules():
            if isinstance(block, ResidualBlock):
                for parameter in block.conv2.parameters():
                    nn.init.zeros_(parameter)
        last = [layer for layer in net if isinstance(layer, nn.Conv2d)][-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
    return kept


def principal_components(images: Tensor, patch: int, channels: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """PCA of the patches of ``images`` [B, 3, H, W], with P = ``patch`` and C = ``channels``.

    Returns the components [C, 3 P P], the mean patch [3 P P], a scale for each channel [C], and the share of the
    variance that the components retain. With this scale, a channel's standard deviation is the fourth root of its
    variance in the PCA, normalised so that the mean variance is 1.
    """
    patches = F.unfold(images, patch, stride=patch).movedim(1, 2).reshape(-1, 3 * patch * patch).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
    order = values.argsort(descending=True)[:channels]
    basis, variance = vectors[:, order].T, values[order]
    basis = basis * basis.sum(1, keepdim=True).sign()  # makes the direction of each vector unique
    deviation = variance.sqrt()
    scale = (deviation / deviation.mean() / variance).sqrt()
    return basis, mean, scale, (variance.sum() / values.sum()).item()
