"""A masked token model wrapped in ComfyUI's model patchers: the value of MASKED_TOKEN_MODEL sockets."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from .networks.uvit import UViT
from .networks.vq import VQGAN

DEFAULT_CFG = {16: 4.0, 32: 10.0}  # by sample_size: the guidance scale with the lowest FID in aMUSEd's paper


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedTokenModel:
    """U-ViT and VQ-GAN; ComfyUI loads, moves and patches each separately."""

    name: str
    transformer: ModelPatcher  # around networks.uvit.UViT
    vq: ModelPatcher  # around networks.vq.VQGAN
    dtype: torch.dtype  # in which the transformer computes
    text: str  # the kind of text encoder that the transformer was trained with
    cfg: float  # the default guidance scale

    @property
    def codebook(self) -> int:
        return self.transformer.model.config.codebook_size

    @property
    def mask_id(self) -> int:
        return self.transformer.model.config.vocab_size - 1

    @property
    def downscale(self) -> int:
        """Pixels along one side of a token."""
        return self.vq.model.config.downscale

    def size_note(self, area: tuple[int, int]) -> list[str]:
        """A line for images of ``area`` (height and width in pixels) that are not of the size of the training images."""
        side = self.transformer.model.config.sample_size * self.downscale
        if area == (side, side):
            return []
        return [f"{self.name} was trained at {side} x {side} pixels"]

    def with_transformer(self, transformer: ModelPatcher) -> "MaskedTokenModel":
        return dataclasses.replace(self, transformer=transformer)


def wrap(name: str, transformer: UViT, vq: VQGAN, text: str, cfg: float | None = None) -> MaskedTokenModel:
    """A MaskedTokenModel of networks that are on the CPU and were built with casting operations."""
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    size = transformer.config.sample_size
    weights = next(transformer.parameters()).dtype
    return MaskedTokenModel(
        name=name,
        # not CoreModelPatcher: it may stream weights to a GPU from their file, which works only for ComfyUI's models
        transformer=ModelPatcher(transformer, load_device=device, offload_device=offload),
        vq=ModelPatcher(
            vq,
            load_device=comfy.model_management.vae_device(),
            offload_device=comfy.model_management.vae_offload_device(),
        ),
        dtype=comfy.model_management.unet_manual_cast(weights, device) or weights,
        text=text,
        cfg=cfg if cfg is not None else DEFAULT_CFG.get(size, DEFAULT_CFG[32]),
    )


@contextmanager
def loaded(patcher: ModelPatcher, memory: int) -> Iterator[nn.Module]:
    """The patched network of ``patcher`` on its device, with ``memory`` bytes free for activations."""
    comfy.model_management.load_models_gpu([patcher], memory_required=memory)
    with torch.inference_mode():
        yield patcher.model
