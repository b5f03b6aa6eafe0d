"""The latent space of the demo checkpoints as ComfyUI's LatentFormat and VAE."""

import comfy.latent_formats
import comfy.ldm.models.autoencoder
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch

from .autoencoder import CHANNELS, PATCH, Autoencoder


class ChorusEmojiLatent(comfy.latent_formats.LatentFormat):
    """ComfyUI's latent format: 8 channels, 8 x 8 pixels per latent position, preview colours."""

    latent_channels = CHANNELS
    spacial_downscale_ratio = PATCH
    scale_factor = 1.0

    def __init__(self, autoencoder: Autoencoder | None = None) -> None:
        if autoencoder is not None:
            self.latent_rgb_factors, self.latent_rgb_factors_bias = autoencoder.preview_factors()


# ComfyUI's VAE accepts only configs of its own autoencoder, so a minimal one is built and then replaced
PLACEHOLDER = {
    "embed_dim": CHANNELS,
    "ddconfig": {
        "double_z": True,
        "z_channels": CHANNELS,
        "resolution": 128,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
}


def make_vae(autoencoder: Autoencoder) -> comfy.sd.VAE:
    """A ComfyUI VAE around an ``Autoencoder``."""
    weights = comfy.ldm.models.autoencoder.AutoencoderKL(**PLACEHOLDER).state_dict()
    vae = comfy.sd.VAE(sd=weights, config={"params": PLACEHOLDER}, dtype=torch.float32)
    vae.first_stage_model = autoencoder.eval().requires_grad_(False)  # ty: ignore[invalid-assignment]  # any module works
    vae.latent_channels = CHANNELS
    # bytes, from a measurement with float32 activations: 64 values per pixel to encode, 128 to decode
    vae.memory_used_encode = lambda shape, dtype: 4 * 64 * shape[2] * shape[3]
    vae.memory_used_decode = lambda shape, dtype: 4 * 128 * PATCH * PATCH * shape[2] * shape[3]
    comfy.model_management.archive_model_dtypes(autoencoder)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        autoencoder, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    vae.model_size()
    return vae
