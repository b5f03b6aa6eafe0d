"""A VAE of one linear layer, for latents with any number of channels, as an object of ComfyUI's VAE class."""

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
import torch.nn.functional as F


class PatchProjection(torch.nn.Module):
    """Projects patches of ``patch`` x ``patch`` pixels to ``channels`` values, and back."""

    def __init__(self, channels, patch):
        super().__init__()
        weights = torch.randn(channels, 3, patch, patch, generator=torch.Generator().manual_seed(0))
        self.patch = patch
        self.weights = torch.nn.Parameter(weights / weights.flatten(1).norm(dim=1).view(-1, 1, 1, 1), False)

    def encode(self, x):
        return F.conv2d(x, self.weights, stride=self.patch)

    def decode(self, z):
        return F.conv_transpose2d(z, self.weights, stride=self.patch)


def tiny_vae(channels, patch=8):
    """A VAE whose latents have ``channels`` channels and one position for each ``patch`` x ``patch`` pixels."""
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    vae.first_stage_model = PatchProjection(channels, patch).eval()
    vae.downscale_ratio = vae.upscale_ratio = patch
    vae.latent_channels, vae.latent_dim = channels, 2
    vae.vae_dtype, vae.size = torch.float32, None
    vae.memory_used_encode = vae.memory_used_decode = lambda shape, dtype: 1000
    comfy.model_management.archive_model_dtypes(vae.first_stage_model)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model,
        load_device=vae.device,
        offload_device=comfy.model_management.vae_offload_device(),
    )
    return vae
