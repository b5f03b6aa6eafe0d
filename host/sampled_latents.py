"""The latent that is sampled, as the single tensor on which search and optimisation work.

Latents of images are [B, C, h, w], those of videos and of the image models of video families [B, C, T, h, w]. Models of
video with audio take a nested latent of two such tensors. ComfyUI's samplers compute with it as one packed tensor
[B, 1, N], and so do search and optimisation.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.nested_tensor import NestedTensor
from torch import Tensor

from ..common.shapes import size_of
from .parametrization import latent_format_of

LATENT_AXES = (4, 5)  # of the part that a VAE decodes to images


@dataclass(frozen=True)
class LatentLayout:
    """Sizes [C, ...] of the parts of a nested latent, or of the only part of another latent."""

    sizes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(samples: Tensor | NestedTensor) -> "LatentLayout":
        return LatentLayout(tuple(tuple(part.shape[1:]) for part in parts_of(samples)))

    @property
    def nested(self) -> bool:
        return len(self.sizes) > 1

    @property
    def packed_size(self) -> tuple[int, ...]:
        """Size of the packed latent without the batch axis."""
        return (1, sum(math.prod(size) for size in self.sizes)) if self.nested else self.sizes[0]

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """Shape of the part that a VAE decodes to images, with a batch of 1."""
        return (1, *self.sizes[0])

    def pack(self, samples: Tensor | NestedTensor) -> Tensor:
        """``samples`` as one tensor: unchanged if they are not nested, else packed, [B, 1, N]."""
        if isinstance(samples, NestedTensor):
            return comfy.utils.pack_latents(samples.unbind())[0]
        return samples

    def unpack(self, x: Tensor) -> Tensor | NestedTensor:
        """Inverse of ``pack``."""
        return NestedTensor(self._parts(x)) if self.nested else x

    def pictures(self, x: Tensor) -> Tensor:
        """The part of a packed ``x`` that a VAE decodes to images, [B, C, h, w] or [B, C, T, h, w]: the first part."""
        return self._parts(x)[0]

    def _parts(self, x: Tensor) -> list[Tensor]:
        return comfy.utils.unpack_latents(x, [(len(x), *size) for size in self.sizes])


def decoded_shape(model: ModelPatcher, layout: LatentLayout) -> tuple[int, ...]:
    """Shape of the latent that a VAE decodes to images, with a batch of 1.

    It is ``layout.picture_shape``, except for models whose latents have other axes than the VAE's (HunyuanImage's refiner).
    """
    return tuple(model.model.process_latent_out(torch.zeros(layout.picture_shape)).shape)


def parts_of(samples: Tensor | NestedTensor) -> list[Tensor]:
    """The tensors of a nested latent, or a list with the only tensor."""
    return list(samples.unbind()) if isinstance(samples, NestedTensor) else [samples]


def sampled_latent(model: ModelPatcher, latent: Mapping[str, Any]) -> Tensor | NestedTensor:
    """``samples`` of a LATENT of one image or video, with the channels and axes of ``model``, as KSampler samples them.

    ValueError for several latents or noise masks, and for latents from which no VAE decodes images.
    """
    samples = comfy.sample.fix_empty_latent_channels(
        model,
        latent["samples"],
        latent.get("downscale_ratio_spacial"),
        latent.get("downscale_ratio_temporal"),
    )
    first, axes = parts_of(samples)[0], latent_format_of(model).latent_dimensions + 2
    if axes in LATENT_AXES and first.ndim != axes:
        wanted = "an image latent [1, C, h, w]" if axes == 4 else "a latent [1, C, T, h, w]"
        nested = " of a nested latent (video with audio)" if samples.is_nested else ""
        raise ValueError(
            f"expected {wanted} for {type(model.model).__name__}, got the size {size_of(first)}{nested}; connect an empty latent"
            " of this model's kind, or use a model of this latent's kind"
        )
    if first.ndim not in LATENT_AXES:
        raise ValueError(
            f"expected a latent of an image [1, C, h, w] or a video [1, C, T, h, w] for {type(model.model).__name__}, got the"
            f" size {size_of(first)}: the results are compared as images, and no VAE decodes images"
            " from such a latent; use an image or video model"
        )
    if len(first) != 1:
        raise ValueError(
            f"expected one latent in latent_image, got {len(first)} latents; set batch_size to 1 or select one with"
            " LatentFromBatch"
        )
    mask = latent.get("noise_mask")
    for part in () if mask is None else parts_of(mask):
        # in a mask for a video, all axes before height and width are frames, except in a mask of 5 axes
        if part.ndim > 2 and len(part) != 1 and (first.ndim == 4 or part.ndim == 5):
            raise ValueError(f"expected one noise mask in latent_image, got {len(part)} noise masks; use one of them")
    return samples


@torch.inference_mode(False)
def draw_noise(latent: Mapping[str, Any], seed: int) -> Tensor | NestedTensor:
    """Noise that KSampler draws for ``seed`` and a LATENT of one image or video."""
    return comfy.sample.prepare_noise(latent["samples"], seed, latent.get("batch_index"))
