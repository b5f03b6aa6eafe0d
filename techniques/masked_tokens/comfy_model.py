"""A masked token model as the host holds it: what its MASKED_TOKEN_MODEL socket carries."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from .networks.uvit import UViT
from .networks.vq import VQGAN

OWN_CFG = {16: 4.0, 32: 10.0}  # by sample_size: aMUSEd's best measured guidance, papers' table of FID over it


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedTokenModel:
    """U-ViT and VQ-GAN, each loaded, moved and patched by the host on its own."""

    name: str
    transformer: ModelPatcher  # around networks.uvit.UViT
    vq: ModelPatcher  # around networks.vq.VQGAN
    dtype: torch.dtype  # what the transformer computes in
    text: str  # the kind of text conditioning that it was trained on
    cfg: float  # the guidance scale that it does best with

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

    def with_transformer(self, transformer: ModelPatcher) -> "MaskedTokenModel":
        return dataclasses.replace(self, transformer=transformer)


def wrap(name: str, transformer: UViT, vq: VQGAN, text: str, cfg: float | None = None) -> MaskedTokenModel:
    """The networks, on the CPU and built with casting operations, in the host's hands."""
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    size = transformer.config.sample_size
    weights = next(transformer.parameters()).dtype
    return MaskedTokenModel(
        name=name,
        # not CoreModelPatcher: what it streams to a GPU layer by layer are the files of the host's own models
        transformer=ModelPatcher(transformer, load_device=device, offload_device=offload),
        vq=ModelPatcher(
            vq,
            load_device=comfy.model_management.vae_device(),
            offload_device=comfy.model_management.vae_offload_device(),
        ),
        dtype=comfy.model_management.unet_manual_cast(weights, device) or weights,
        text=text,
        cfg=cfg if cfg is not None else OWN_CFG.get(size, OWN_CFG[32]),
    )


@contextmanager
def loaded(patcher: ModelPatcher, memory: int) -> Iterator[nn.Module]:
    """The network of ``patcher`` with its patches, on its device, with ``memory`` bytes free for what it computes."""
    comfy.model_management.load_models_gpu([patcher], memory_required=memory)
    with torch.inference_mode():
        yield patcher.model
