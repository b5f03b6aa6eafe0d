"""Folders with small random masked token models, in the layout of the published aMUSEd."""

import json
from pathlib import Path

import safetensors.torch
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from chorus.techniques.masked_tokens.networks.vq import VQGAN, VQConfig
from chorus.tests.support import tiny_uvit

WIDTH = 32  # of the text encoder
TRANSFORMER = {
    "_class_name": "UVit2DModel",
    **tiny_uvit.SIZES,
    "encoder_hidden_size": WIDTH,
    "cond_embed_dim": WIDTH,
    "downsample": False,
    "upsample": False,
    "sample_size": 16,
}
VQ = {
    "_class_name": "VQModel",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 6,
    "vq_embed_dim": None,
    "num_vq_embeddings": 37,
    "block_out_channels": [8, 16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
TEXT = {
    "vocab_size": 49408,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "projection_dim": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "eos_token_id": 2,  # as in configs that old versions of the transformers library wrote
}
WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vqvae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def random_weights(network: torch.nn.Module) -> dict:
    """Random weights that are exact in float16, so that ComfyUI may store them in half precision."""
    weights = {}
    for name, weight in network.state_dict().items():
        values = torch.randn(weight.shape)
        if weight.ndim > 1 and "embedding" not in name and "channelwise_norm" not in name:
            values *= weight[0].numel() ** -0.5
        elif weight.ndim == 1:
            values = values * 0.2 + (0 if name.endswith("bias") else 1)
        weights[name] = values.half().float()
    return weights


def transformer_weights(config: dict) -> dict:
    return random_weights(tiny_uvit.make_uvit(config))


def vq_weights(config: dict) -> dict:
    sizes = {
        key: tuple(v) if isinstance(v, list) else v for key, v in config.items() if key in VQConfig.__dataclass_fields__
    }
    return random_weights(
        VQGAN(VQConfig(**sizes | {"vq_embed_dim": config["vq_embed_dim"] or config["latent_channels"]}))
    )


def text_encoder(config: dict) -> CLIPTextModelWithProjection:
    model = CLIPTextModelWithProjection(CLIPTextConfig(**config)).eval()
    model.load_state_dict(random_weights(model))
    return model


def write_part(folder: Path, part: str, weights: dict, config: dict, file: str | None = None) -> Path:
    (folder / part).mkdir(parents=True, exist_ok=True)
    path = folder / part / (file or WEIGHTS[part])
    safetensors.torch.save_file({key: w.contiguous() for key, w in weights.items()}, path)
    (folder / part / "config.json").write_text(json.dumps(config))
    return path


def write(folder: Path, **transformer) -> Path:
    """Write a complete model; ``transformer`` overrides entries of the transformer's config."""
    config = TRANSFORMER | transformer
    write_part(folder, "transformer", transformer_weights(config), config)
    write_part(folder, "vqvae", vq_weights(VQ), VQ)
    write_part(folder, "text_encoder", text_encoder(TEXT).state_dict(), TEXT)
    return folder
