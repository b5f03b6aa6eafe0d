"""Pictures of latents and embeddings of pictures, by the host's VAE and CLIP_VISION, open to gradients.

Values are those of the host's own decode and encode_image. Shapes: B samples, H and W pixels, h and w latent positions.
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

ENCODED_AT_ONCE = 16  # pictures; the host does not ask how many fit


class Decoder(Protocol):
    """A VAE's first_stage_model."""

    def decode(self, latent: Tensor, /) -> Tensor: ...


def check_vae(vae: VAE) -> None:
    """Refuse a VAE that decodes no pictures."""
    vae.throw_exception_if_invalid()
    if vae.latent_dim != 2:
        raise ValueError(
            f"the VAE ({type(vae.first_stage_model).__name__}) decodes video or sound, its latents have {vae.latent_dim}"
            " axes; SeedSelect works on pictures, use the VAE of an image model"
        )


def decode(vae: VAE, module: Decoder, latent: Tensor) -> Tensor:
    """Pictures [B, H, W, 3] in 0..1, on the device of ``latent`` [B, C, h, w], by ``module``: the VAE's or a copy.

    As VAE.decode, without its splitting into batches and tiles. Where a picture is clipped there is no gradient.
    """
    out = module.decode(latent.to(device=vae.device, dtype=vae.vae_dtype))
    # a copy, since what follows works in place
    return vae.process_output(out.to(dtype=vae.vae_output_dtype(), copy=True)).movedim(1, -1).to(latent.device)


def encode(vae: VAE, images: Tensor, latent: Tensor) -> Tensor:
    """Latents [K, C, h, w] of pictures [K, H, W, 3], squashed (bicubic) to the picture of a ``latent`` [1, C, h, w].

    By the host's VAE, which it loads, as ``embeddings`` does. A ValueError where the VAE's latents are others.
    """
    size = [n * vae.spacial_compression_encode() for n in latent.shape[-2:]]
    pixels = F.interpolate(images[..., :3].movedim(-1, 1).float(), size, mode="bicubic", antialias=True)
    found = vae.encode(pixels.clamp(0.0, 1.0).movedim(1, -1))
    if found.shape[1:] != latent.shape[1:]:
        raise ValueError(
            f"the VAE makes latents of {size_of(found[:1])} and the model samples {size_of(latent)}; use the VAE of this model"
        )
    return found


def embeddings(clip_vision: ClipVisionModel, images: Tensor) -> Tensor:
    """Embeddings [B, D] of pictures [B, H, W, 3] without gradients, as ``embed`` has them."""
    found = torch.cat([clip_vision.encode_image(rows)["image_embeds"] for rows in images.split(ENCODED_AT_ONCE)])
    return (found.mean(1) if found.ndim == 3 else found).float()


def check_clip_vision(clip_vision: ClipVisionModel) -> None:
    """Refuse an encoder whose preparation of pictures has no fixed size."""
    if clip_vision.image_size <= 0:
        raise ValueError(
            f"the encoder ({clip_vision.model_type}) reads pictures of any size, and no gradient is known through its"
            " preparation; use a CLIP, SigLIP or DINO encoder of a fixed size"
        )


def embed(clip_vision: ClipVisionModel, module: Callable, image: Tensor, crop: bool = True) -> Tensor:
    """Embeddings [B, D] of pictures [B, H, W, 3], on their device, by ``module``: the encoder's or a copy.

    The image_embeds of CLIP_VISION.encode_image; where they are one for each patch, their mean. The host rounds pictures
    to 8 bit and clips them; the gradient goes straight through both.
    """
    smooth, exact = _prepared(clip_vision, image.to(clip_vision.load_device), crop)
    pixels = exact + (smooth - smooth.detach())  # straight-through: plus exactly 0, with the gradient of ``smooth``
    found = module(pixel_values=pixels, intermediate_output="all" if clip_vision.return_all_hidden_states else -2)[2]
    found = found.to(device=image.device, dtype=torch.float32)
    return found.mean(1) if found.ndim == 3 else found


def _prepared(clip_vision: ClipVisionModel, image: Tensor, crop: bool) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, size, size]: smooth in ``image``, and as the host gives them to the network."""
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
