"""aMUSEd's transformer and VQ-GAN at their published sizes with random weights, in the pack and in diffusers.

Needs only torch and einops; the functions on diffusers also need that package.
"""

import importlib
from dataclasses import asdict

import torch

from ...techniques.masked_tokens.networks.uvit import MICRO_VALUES, UViT, UViTConfig
from ...techniques.masked_tokens.networks.vq import VQGAN, VQConfig
from .random_weights import fill

# sizes that amused-256 and amused-512 share; diffusers' defaults
UVIT = {
    "hidden_size": 1024,
    "encoder_hidden_size": 768,
    "cond_embed_dim": 768,
    "micro_cond_encode_dim": 256,
    "vocab_size": 8256,
    "codebook_size": 8192,
    "in_channels": 768,
    "block_out_channels": 768,
    "num_res_blocks": 3,
    "block_num_heads": 12,
    "num_hidden_layers": 22,
    "num_attention_heads": 16,
    "intermediate_size": 2816,
}
# sizes in which amused-256 and amused-512 differ
TRANSFORMER = {
    256: {"downsample": False, "upsample": False, "sample_size": 16},
    512: {"downsample": True, "upsample": True, "sample_size": 32},
}
VQ = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 64,
    "vq_embed_dim": 64,
    "num_vq_embeddings": 8192,
    "block_out_channels": (128, 256, 256, 512, 768),
    "layers_per_block": 2,
}
TEXT_TOKENS, TEXT_WIDTH = 77, 768


def pack_networks(uvit: UViTConfig, vq: VQConfig, dtype: torch.dtype) -> tuple[UViT, VQGAN]:
    """The pack's networks with random weights, on the CPU. The VQ-GAN is float32, as in the pack's nodes."""
    with torch.device("meta"):
        made = UViT(uvit).to(dtype), VQGAN(vq)
    generator = torch.Generator().manual_seed(uvit.sample_size)
    networks = tuple(network.to_empty(device="cpu") for network in made)
    for network in networks:
        fill(network, generator)
        network.eval().requires_grad_(False)
    return networks


def published_configs(size: int) -> tuple[UViTConfig, VQConfig]:
    """The sizes of amused-256 or amused-512."""
    return UViTConfig(**UVIT, **TRANSFORMER[size]), VQConfig(**VQ)


def diffusers_networks(uvit: UViT, vq: VQGAN, device: torch.device):
    """diffusers' networks with the weights of the pack's, on ``device``. Raises ImportError without diffusers."""
    unet_model = importlib.import_module("diffusers.models.unets.uvit_2d")
    vq_model = importlib.import_module("diffusers.models.autoencoders.vq_model")
    sizes, micro = asdict(vq.config), MICRO_VALUES * uvit.config.micro_cond_encode_dim
    blocks = len(sizes["block_out_channels"])
    with torch.device("meta"):
        theirs = (
            unet_model.UVit2DModel(**asdict(uvit.config), micro_cond_embed_dim=micro),
            vq_model.VQModel(
                down_block_types=("DownEncoderBlock2D",) * blocks,
                up_block_types=("UpDecoderBlock2D",) * blocks,
                mid_block_add_attention=False,
                lookup_from_codebook=True,
                **sizes,
            ),
        )
    for network, own in zip(theirs, (uvit, vq)):
        network.load_state_dict(own.state_dict(), assign=True)
        network.eval().requires_grad_(False).to(device)
    return theirs


def random_networks(size: int, dtype: torch.dtype):
    """diffusers' transformer and VQ-GAN of a published size with random weights, on the CPU."""
    return diffusers_networks(*pack_networks(*published_configs(size), dtype), torch.device("cpu"))


def text(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random text states [batch, 77, 768] and pooled outputs [batch, 768]: the inputs of diffusers and of the pack."""
    generator = torch.Generator().manual_seed(batch)
    states = torch.randn(batch, TEXT_TOKENS, TEXT_WIDTH, generator=generator)
    return states, torch.randn(batch, TEXT_WIDTH, generator=generator)
