"""Two tiny U-ViTs in aMUSEd's layout: SIZES has the form of aMUSEd's config.json, CONFIG is a UViTConfig."""

import torch

from chorus.techniques.masked_tokens.networks.uvit import UViT, UViTConfig

SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 3,
    "encoder_hidden_size": 20,
    "cond_embed_dim": 12,
    "micro_cond_encode_dim": 6,
    "micro_cond_embed_dim": 30,
    "vocab_size": 40,
    "codebook_size": 37,
    "in_channels": 24,
    "block_out_channels": 32,
    "block_num_heads": 2,
    "num_res_blocks": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 56,
}


def make_uvit(config) -> UViT:
    """The network of a config.json. Keys that UViTConfig does not have are ignored."""
    known = UViTConfig.__dataclass_fields__
    sizes = {key: value for key, value in config.items() if key in known}
    return UViT(UViTConfig(**{"downsample": False, "upsample": False} | sizes))


CONFIG = UViTConfig(
    hidden_size=32,
    encoder_hidden_size=16,
    cond_embed_dim=12,
    micro_cond_encode_dim=8,
    vocab_size=17,
    codebook_size=16,
    in_channels=16,
    block_out_channels=24,
    num_res_blocks=1,
    block_num_heads=2,
    downsample=False,
    upsample=False,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    sample_size=4,
)


def random_weights(seed=0):
    """Random weights of a U-ViT of CONFIG that keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in UViT(CONFIG).state_dict().items():
        scale = 1.0 if weight.ndim == 1 else weight[0].numel() ** -0.5
        weights[name] = torch.randn(weight.shape, generator=generator) * scale + (weight.ndim == 1)
    return weights
