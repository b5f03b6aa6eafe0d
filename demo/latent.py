"""The latent space of the demo checkpoints: a fixed PCA of 4x4 pixel patches to 12 channels, and a trained decoder."""

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 4
CHANNELS = 12


class PatchPCA(nn.Module):
    """PCA of patches: [B, 3, H, W] in -1..1 -> [B, 12, H/4, W/4] with about unit variance. ``decode`` is its
    pseudo-inverse.

    latent = scale * (weight . (patch - mean)), with weight [12, 3, 4, 4] (orthonormal rows), mean [3, 4, 4] and scale
    [12].
    """

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 3, PATCH, PATCH), requires_grad=False)
        self.mean = nn.Parameter(torch.zeros(3, PATCH, PATCH), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(channels), requires_grad=False)

    def encode(self, x: Tensor) -> Tensor:
        shift = torch.einsum("cnij,nij->c", self.weight, self.mean)
        return F.conv2d(x, self.weight * self.scale[:, None, None, None], -shift * self.scale, stride=PATCH)

    def decode(self, z: Tensor) -> Tensor:
        patches = F.conv_transpose2d(z, self.weight / self.scale[:, None, None, None], stride=PATCH)
        return patches + self.mean.repeat(1, z.shape[-2], z.shape[-1])


def preview_factors(pca: PatchPCA) -> tuple[list[list[float]], list[float]]:
    """(factors [12, 3], bias [3]) for ComfyUI's latent2rgb previews. They map a latent to the mean colour of its patch,
    in -1..1."""
    factors = (pca.weight / pca.scale[:, None, None, None]).mean((2, 3))
    return factors.tolist(), pca.mean.mean((1, 2)).tolist()


class Cleaner(nn.Module):
    """Correction of the linear decoder: [B, 12, h, w] -> [B, 3, 4h, 4w], by small convolutions over neighbouring patches."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, width, 3, padding=1)
        self.middle = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.last = nn.Conv2d(width, 3 * PATCH * PATCH, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.first(z)
        for layer in self.middle:
            h = h + layer(F.silu(h))
        return F.pixel_shuffle(self.last(F.silu(h)), PATCH)


class DemoVAE(nn.Module):
    """Encodes with the PCA. Decodes with the PCA's pseudo-inverse plus the correction of the Cleaner, trained on noisy
    latents."""

    def __init__(self) -> None:
        super().__init__()
        self.pca, self.cleaner = PatchPCA(), Cleaner()

    def encode(self, x: Tensor) -> Tensor:
        return self.pca.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.pca.decode(z) + self.cleaner(z)


class ChorusDemoLatent(comfy.latent_formats.LatentFormat):
    """ComfyUI's latent format: 12 channels, 4 x 4 pixels per latent position, preview colours."""

    latent_channels = CHANNELS
    spacial_downscale_ratio = PATCH
    scale_factor = 1.0

    def __init__(self, pca: PatchPCA | None = None) -> None:
        if pca is not None:
            self.latent_rgb_factors, self.latent_rgb_factors_bias = preview_factors(pca)


def make_vae(module: DemoVAE) -> comfy.sd.VAE:
    """A ComfyUI VAE around a DemoVAE."""
    vae = comfy.sd.VAE(
        sd={"pixel_space_vae": torch.tensor(1.0)}
    )  # ComfyUI's simplest VAE; its fields are replaced below
    # float32 unless a start option of ComfyUI selects another dtype, as in ComfyUI's VAE
    vae.vae_dtype = comfy.model_management.vae_dtype(vae.device)
    module = module.to(vae.vae_dtype)
    vae.first_stage_model = module.eval().requires_grad_(False)  # ty: ignore[invalid-assignment]  # any module works
    vae.downscale_ratio = vae.upscale_ratio = PATCH
    vae.latent_channels = CHANNELS
    vae.size = None
    vae.memory_used_encode = lambda shape, dtype: 64 * shape[2] * shape[3]
    vae.memory_used_decode = lambda shape, dtype: 4 * 4 * 64 * shape[2] * shape[3]
    comfy.model_management.archive_model_dtypes(module)
    offload = comfy.model_management.vae_offload_device()
    vae.patcher = comfy.model_patcher.ModelPatcher(module, load_device=vae.device, offload_device=offload)
    vae.model_size()
    return vae
