"""The latent space of the demo checkpoints: a fixed PCA of 4x4 pixel patches, 12 channels, and a decoder that cleans up."""

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
    """encode: [B, 3, H, W] in -1..1 -> [B, 12, H/4, W/4] of about unit variance; decode is its adjoint.

    weight: [12, 3, 4, 4] orthonormal rows, mean: [3, 4, 4], scale: [12] so that latent = scale * (weight . (patch - mean)).
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
    """(factors [12, 3], bias [3]): a latent's mean colour of its patch, in -1..1, as the host's latent2rgb preview wants it."""
    factors = (pca.weight / pca.scale[:, None, None, None]).mean((2, 3))
    return factors.tolist(), pca.mean.mean((1, 2)).tolist()


class Cleaner(nn.Module):
    """What the linear decoder lacks: [B, 12, h, w] -> a correction [B, 3, 4h, 4w]; small convolutions over neighbouring patches."""

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
    """encode: the PCA; decode: its adjoint plus the cleaner's correction, which was trained to see through noisy latents."""

    def __init__(self) -> None:
        super().__init__()
        self.pca, self.cleaner = PatchPCA(), Cleaner()

    def encode(self, x: Tensor) -> Tensor:
        return self.pca.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.pca.decode(z) + self.cleaner(z)


class ChorusDemoLatent(comfy.latent_formats.LatentFormat):
    """Told to the host: 12 channels, 4 pixels per latent, preview colours."""

    latent_channels = CHANNELS
    spacial_downscale_ratio = PATCH
    scale_factor = 1.0

    def __init__(self, pca: PatchPCA | None = None) -> None:
        if pca is not None:
            self.latent_rgb_factors, self.latent_rgb_factors_bias = preview_factors(pca)


def make_vae(module: DemoVAE) -> comfy.sd.VAE:
    """The host's VAE object around a DemoVAE."""
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})  # the host's simplest VAE, its fields replaced below
    vae.first_stage_model = module.eval().requires_grad_(False)  # ty: ignore[invalid-assignment]  # any module will do
    vae.downscale_ratio = vae.upscale_ratio = PATCH
    vae.latent_channels = CHANNELS
    vae.vae_dtype = torch.float32
    vae.size = None
    vae.memory_used_encode = lambda shape, dtype: 64 * shape[2] * shape[3]
    vae.memory_used_decode = lambda shape, dtype: 4 * 4 * 64 * shape[2] * shape[3]
    comfy.model_management.archive_model_dtypes(module)
    offload = comfy.model_management.vae_offload_device()
    vae.patcher = comfy.model_patcher.ModelPatcher(module, load_device=vae.device, offload_device=offload)
    vae.model_size()
    return vae
