"""Differentiable decoding and image embeddings with ComfyUI's VAE and CLIP_VISION.

Values equal those of VAE.decode and encode_image. Shapes: B samples, H and W pixels, h and w latent positions.
"""

from collections.abc import Callable
from typing import Protocol

import comfy.clip_model
import torch
import torch.nn.functional as F
from comfy.clip_vision import ClipVisionModel
from comfy.sd import VAE
from torch import Tensor

from ..common.shapes import size_of

ENCODE_BATCH = 16  # images; ComfyUI does not check how many fit in memory


class Decoder(Protocol):
    """Interface of a VAE's first_stage_model."""

    def decode(self, latent: Tensor, /) -> Tensor: ...


def check_vae(vae: VAE, remedy: str) -> None:
    """Raise a ValueError that ends with ``remedy`` for a VAE that does not decode images."""
    vae.throw_exception_if_invalid()
    if vae.latent_dim != 2:
        raise ValueError(
            f"the VAE ({type(vae.first_stage_model).__name__}) decodes video or audio: its latents have {vae.latent_dim}"
            f" spatial axes, not 2; {remedy}"
        )


def decode(vae: VAE, module: Decoder, latent: Tensor) -> Tensor:
    """Images [B, H, W, 3] in 0..1, float32, on the device of ``latent`` [B, C, h, w]. ``module``: the VAE's network or a copy.

    Same values as VAE.decode, but without splitting into batches or tiles. Clipped pixels have no gradient. With
    --fp16-intermediates the values are rounded to float16. The gradient passes this rounding unchanged, because a
    float16 gradient would underflow.
    """
    out = module.decode(latent.to(device=vae.device, dtype=vae.vae_dtype))

    def processed(dtype: torch.dtype) -> Tensor:
        # a copy, since process_output works in place
        return vae.process_output(out.to(dtype=dtype, copy=True)).movedim(1, -1).to(latent.device, torch.float32)

    images, dtype = processed(torch.float32), vae.vae_output_dtype()
    if dtype == torch.float32:
        return images
    with torch.no_grad():
        rounded = processed(dtype)
    return rounded + (images - images.detach())


def encode(vae: VAE, images: Tensor, latent: Tensor) -> Tensor:
    """Latents [K, C, h, w], float32, of K images [K, H, W, 3].

    The images are first resized (bicubic, not cropped) to the size that a ``latent`` [1, C, h, w] decodes to. Loads the
    VAE. A ValueError if the VAE encodes to another shape than that of ``latent``.
    """
    size = [n * vae.spacial_compression_encode() for n in latent.shape[-2:]]
    pixels = F.interpolate(images[..., :3].movedim(-1, 1).float(), size, mode="bicubic", antialias=True)
    encoded = vae.encode(pixels.clamp(0.0, 1.0).movedim(1, -1)).float()
    if encoded.shape[1:] != latent.shape[1:]:
        raise ValueError(
            f"the VAE makes latents of {size_of(encoded[:1])} and the model samples {size_of(latent)}; use the VAE of this model"
        )
    return encoded


def embeddings(clip_vision: ClipVisionModel, images: Tensor) -> Tensor:
    """Embeddings [B, D] of images [B, H, W, 3], as from ``embed`` but without gradients. Loads the encoder."""
    embeds = torch.cat([clip_vision.encode_image(rows)["image_embeds"] for rows in images.float().split(ENCODE_BATCH)])
    return (embeds.mean(1) if embeds.ndim == 3 else embeds).float()


def check_clip_vision(clip_vision: ClipVisionModel) -> None:
    """Raise a ValueError for an encoder without a fixed image size."""
    if clip_vision.image_size <= 0:
        raise ValueError(
            f"the encoder ({clip_vision.model_type}) takes images of any size, and its preprocessing has no gradient; use"
            " a CLIP, SigLIP or DINO encoder of a fixed size"
        )


def embed(clip_vision: ClipVisionModel, module: Callable, image: Tensor, crop: bool = True) -> Tensor:
    """Embeddings [B, D] of images [B, H, W, 3] on their device. ``module``: the encoder's network or a copy.

    These are the image_embeds of CLIP_VISION.encode_image, averaged if the encoder returns one embedding per patch.
    ComfyUI rounds images to 8 bit and clips them; the gradient ignores both operations (straight-through).
    """
    smooth, exact = _prepared(clip_vision, image.to(clip_vision.load_device), crop)
    # straight-through: the sum adds exactly 0, which has the gradient of ``smooth``
    pixels = exact + (smooth - smooth.detach())
    embeds = module(pixel_values=pixels, intermediate_output="all" if clip_vision.return_all_hidden_states else -2)[2]
    embeds = embeds.to(device=image.device, dtype=torch.float32)
    return embeds.mean(1) if embeds.ndim == 3 else embeds


def _prepared(clip_vision: ClipVisionModel, image: Tensor, crop: bool) -> tuple[Tensor, Tensor]:
    """The pixels [B, 3, size, size] twice: differentiable in ``image``, and exactly as ComfyUI prepares them."""
    settings = {"size": clip_vision.image_size, "mean": clip_vision.image_mean, "std": clip_vision.image_std}
    exact = comfy.clip_model.clip_preprocess(image.detach(), crop=crop, **settings).float()
    smooth, size = image[..., :3].movedim(-1, 1), clip_vision.image_size
    if smooth.shape[-2:] != (size, size):
        height, width = smooth.shape[-2:]
        scale = size / min(height, width)
        scaled = (round(scale * height), round(scale * width)) if crop else (size, size)
        smooth = F.interpolate(smooth, size=scaled, mode="bicubic", antialias=True)
        top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
        smooth = smooth[..., top : top + size, left : left + size]
    mean, std = (smooth.new_tensor(v).view(3, 1, 1) for v in (clip_vision.image_mean, clip_vision.image_std))
    return ((smooth - mean) / std).float(), exact
