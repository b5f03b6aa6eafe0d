"""Differentiable decoding and image embeddings with ComfyUI's VAE and CLIP_VISION.

Values equal those of VAE.decode and encode_image. Shapes: B samples, H and W pixels, h and w latent positions. Videos have
F frames, in latents T frames: the latent of a video is [B, C, T, h, w], and its decoded frames are [B, F, H, W, 3].
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import comfy.clip_model
import torch
import torch.nn.functional as F
from comfy.clip_vision import ClipVisionModel
from comfy.sd import VAE
from torch import Tensor

from ..common.shapes import size_of

ENCODE_BATCH = 16  # images; ComfyUI does not check how many fit in memory
FRAMES = 4  # frames of a video that are scored and shown, evenly taken


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


def check_decodes(vae: VAE, shape: Sequence[int], remedy: str) -> None:
    """Raise a ValueError that ends with ``remedy`` for a VAE that decodes no images or videos from a latent of ``shape``.

    ``shape``: [B, C, h, w], or [B, C, T, h, w] for videos and for the image models of video families.
    """
    vae.throw_exception_if_invalid()
    name = type(vae.first_stage_model).__name__
    if vae.latent_dim not in (2, 3) or vae.extra_1d_channel is not None or vae.output_channels < 3:
        raise ValueError(f"the VAE ({name}) decodes audio, not images; {remedy}")
    size = size_of(shape)
    if vae.latent_dim == 3 and len(shape) != 5:
        raise ValueError(
            f"the VAE ({name}) decodes latents of 5 axes [batch, channels, frames, height, width], the model samples"
            f" {size}; {remedy}"
        )
    if (vae.latent_dim == 2 or vae.not_video) and len(shape) == 5 and shape[2] > 1:
        raise ValueError(
            f"the VAE ({name}) encodes and decodes single images, the latent {size} has {shape[2]} frames; {remedy}"
        )
    if vae.latent_channels != shape[1]:
        raise ValueError(
            f"the VAE ({name}) decodes latents of {vae.latent_channels} channels, the model samples {size} with {shape[1]}"
            f" channels; {remedy}"
        )


def decode(vae: VAE, module: Decoder, latent: Tensor) -> Tensor:
    """Images [B, H, W, 3] in 0..1, float32, on the device of ``latent`` [B, C, h, w]. ``module``: the VAE's network or a copy.

    A latent [B, C, T, h, w] gives [B, F, H, W, 3], except with a VAE of images, which decodes its only frame to an image.

    Same values as VAE.decode, but without splitting into batches or tiles. Clipped pixels have no gradient. With
    --fp16-intermediates the values are rounded to float16. The gradient passes this rounding unchanged, because a
    float16 gradient would underflow.
    """
    if vae.latent_dim == 2 and latent.ndim == 5:
        latent = latent[:, :, 0]
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


def encode(vae: VAE, images: Tensor, shape: Sequence[int]) -> Tensor:
    """Latents [K, C, h, w], float32, of K images [K, H, W, 3]; [K, C, T, h, w] for the ``shape`` of a video.

    The images are first resized (bicubic, not cropped) to the size that a latent of ``shape`` [1, C, h, w] or
    [1, C, T, h, w] decodes to. For a video, each image is encoded as a video of this length that does not change. Loads the
    VAE. A ValueError if the VAE encodes to another shape than ``shape``.
    """
    size = [n * vae.spacial_compression_encode() for n in shape[-2:]]
    pixels = F.interpolate(images[..., :3].movedim(-1, 1).float(), size, mode="bicubic", antialias=True)
    pixels = pixels.clamp(0.0, 1.0).movedim(1, -1)
    if len(shape) == 5 and vae.latent_dim == 3 and not vae.not_video:
        # ComfyUI takes a batch of images for the frames of one video
        frames = frame_count(vae, shape[2])
        encoded = torch.cat([vae.encode(row.repeat(frames, 1, 1, 1)) for row in pixels.split(1)]).float()
    else:
        encoded = vae.encode(pixels).float()
        if len(shape) == 5 and encoded.ndim == 4:
            encoded = encoded.unsqueeze(2)
    if tuple(encoded.shape[1:]) != tuple(shape[1:]):
        raise ValueError(
            f"the VAE makes latents of {size_of(encoded[:1])} and the model samples {size_of(shape)}; use the VAE of"
            " this model, and for a video a number of frames that the VAE can make"
        )
    return encoded


def frame_count(vae: VAE, latent_frames: int) -> int:
    """Number of frames that a video VAE decodes from ``latent_frames`` frames of a latent."""
    ratio = vae.upscale_ratio
    return int(ratio[0](latent_frames)) if isinstance(ratio, tuple) and callable(ratio[0]) else latent_frames


def evenly_taken_frames(video: Tensor, most: int) -> Tensor:
    """[B, F', H, W, 3]: at most ``most`` evenly taken frames of videos [B, F, H, W, 3], with the first and the last."""
    places = torch.linspace(0, video.shape[1] - 1, min(most, video.shape[1])).round().long().tolist()
    return torch.stack([video[:, place, ..., :3] for place in places], 1)


def filmstrips(images: Tensor) -> Tensor:
    """Images [B, H, F' W, 3]: FRAMES frames of videos [B, F, H, W, 3], side by side. Images stay as they are."""
    return images if images.ndim == 4 else evenly_taken_frames(images, FRAMES).movedim(1, 2).flatten(2, 3)


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
