"""The latent space: fits the PCA of 4x4 patches on canvases of both styles."""

import numpy as np
import torch

from ...demo.latent import CHANNELS, PATCH, PatchPCA
from ..recipes.pca import principal_components
from ..weights import save_weights
from .canvas import Canvases


def fit(images, channels=CHANNELS):
    """The PCA of images [B, 3, H, W] in -1..1, and the share of the variance that it keeps."""
    basis, mean, scale, kept = principal_components(images, PATCH, channels)
    pca = PatchPCA(channels)
    pca.weight.data = basis.reshape(channels, 3, PATCH, PATCH).float()
    pca.mean.data = mean.reshape(3, PATCH, PATCH).float()
    pca.scale.data = scale.float()
    return pca, kept


def main(canvases=2048, seed=5):
    images = np.concatenate([Canvases(style, seed=seed).batch(0, canvases)[0] for style in ("noto", "twemoji")])
    x = torch.from_numpy(images).movedim(3, 1).float() / 127.5 - 1
    pca, kept = fit(x)
    save_weights("pca", pca.state_dict(), variance_kept=round(kept, 5), license="CC-BY-4.0")
    z = pca.encode(x)
    error = (pca.decode(z) - x).square().mean().item()
    print(f"pca: keeps {kept:.2%} of the variance; mean squared error {error:.5f} (pixels in -1..1)")
    print("channel std", [round(v, 2) for v in z.std((0, 2, 3)).tolist()], "all", round(z.std().item(), 3))
