"""The latent space: fits the PCA of 4x4 patches on canvases of both styles."""

import numpy as np
import torch
import torch.nn.functional as F

from ...demo.latent import CHANNELS, PATCH, PatchPCA
from ..weights import save_weights
from .canvas import Canvases


def fit(images, channels=CHANNELS, power=0.5):
    """images: [B, 3, H, W] in -1..1. power 1 makes every channel's variance 1; 0.5 keeps the order of the variances
    (mean 1), which spends less of a diffusion model on fine detail."""
    patches = F.unfold(images, PATCH, stride=PATCH).movedim(1, 2).reshape(-1, 3 * PATCH * PATCH).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
    order = values.argsort(descending=True)[:channels]
    weight = vectors[:, order].T
    weight = weight * weight.sum(1, keepdim=True).sign()  # a fixed sign for every vector
    variance = values[order]
    kept = variance ** (1 - power)
    scale = (kept / kept.mean() / variance).sqrt()
    pca = PatchPCA(channels)
    pca.weight.data = weight.reshape(channels, 3, PATCH, PATCH).float()
    pca.mean.data = mean.reshape(3, PATCH, PATCH).float()
    pca.scale.data = scale.float()
    return pca, (values[order].sum() / values.sum()).item()


def main(canvases=2048, seed=5):
    images = np.concatenate([Canvases(style, seed=seed).batch(0, canvases)[0] for style in ("noto", "twemoji")])
    x = torch.from_numpy(images).movedim(3, 1).float() / 127.5 - 1
    pca, kept = fit(x)
    save_weights("pca", pca.state_dict(), variance_kept=round(kept, 5), license="CC-BY-4.0")
    z = pca.encode(x)
    error = (pca.decode(z) - x).square().mean().item()
    print(f"pca: keeps {kept:.2%} of the variance; mean squared error {error:.5f} (pixels in -1..1)")
    print("channel std", [round(v, 2) for v in z.std((0, 2, 3)).tolist()], "all", round(z.std().item(), 3))


if __name__ == "__main__":
    main()
