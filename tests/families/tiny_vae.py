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
        return self._each_frame(lambda x: F.conv2d(x, self.weights, stride=self.patch), x)

    def decode(self, z):
        return self._each_frame(lambda z: F.conv_transpose2d(z, self.weights, stride=self.patch), z)

    @staticmethod
    def _each_frame(function, x):
        if x.ndim == 4:
            return function(x)
        return function(x.movedim(2, 1).flatten(0, 1)).unflatten(0, (len(x), -1)).movedim(1, 2)


class CausalProjection(PatchProjection):
    """As PatchProjection, of videos: a latent frame after the first stands for two frames, as in causal video VAEs.

    It holds the mean of the two, and decodes to two frames of which the second is darker.
    """

    def encode(self, x):
        first, pairs = x[:, :, :1], x[:, :, 1:].unflatten(2, (-1, 2)).mean(3)
        return super().encode(torch.cat([first, pairs], 2))

    def decode(self, z):
        frames = super().decode(z)
        pairs = torch.stack([frames[:, :, 1:], frames[:, :, 1:] * 0.9], 3).flatten(2, 3)
        return torch.cat([frames[:, :, :1], pairs], 2)


def tiny_vae(channels, patch=8, video=False):
    """A VAE whose latents have ``channels`` channels and one position for each ``patch`` x ``patch`` pixels.

    ``video``: its latents have 5 axes, and T frames of a latent are 2 T - 1 frames of a video.
    """
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    vae.first_stage_model = (CausalProjection if video else PatchProjection)(channels, patch).eval()
    vae.downscale_ratio = vae.upscale_ratio = patch
    vae.latent_channels, vae.latent_dim = channels, 2
    if video:
        vae.latent_dim = 3
        vae.downscale_ratio = (lambda frames: (frames + 1) // 2, patch, patch)
        vae.upscale_ratio = (lambda frames: 2 * frames - 1, patch, patch)
    vae.vae_dtype, vae.size = torch.float32, None
    vae.memory_used_encode = vae.memory_used_decode = lambda shape, dtype: 1000
    comfy.model_management.archive_model_dtypes(vae.first_stage_model)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model,
        load_device=vae.device,
        offload_device=comfy.model_management.vae_offload_device(),
    )
    return vae
