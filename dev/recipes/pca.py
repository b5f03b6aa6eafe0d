"""The autoencoder's first weights: the PCA of patches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...demo.emoji.autoencoder import CHANNELS, PATCH, Autoencoder, ResidualBlock


@torch.no_grad()
def start_as_pca(model: Autoencoder, images: Tensor) -> float:
    """Sets the linear parts to the PCA of the patches of ``images`` [B, 3, H, W] in -1..1, all other layers to the identity.

    The latent's channels keep the order of their variances (their deviations are the fourth root of the PCA's, of mean 1),
    so that less of a denoiser is spent on fine detail. Returns the share of the variance that the code keeps.
    """
    patches = F.unfold(images, PATCH, stride=PATCH).movedim(1, 2).reshape(-1, 3 * PATCH * PATCH).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
    order = values.argsort(descending=True)[:CHANNELS]
    basis, variance = vectors[:, order].T, values[order]
    basis = basis * basis.sum(1, keepdim=True).sign()  # a fixed direction of every vector
    kept = variance.sqrt()
    scale = (kept / kept.mean() / variance).sqrt()
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
    return (variance.sum() / values.sum()).item()
