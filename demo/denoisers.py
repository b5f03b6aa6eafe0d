"""Sizes of the demo denoisers, as arguments of ComfyUI's network classes."""

from .autoencoder import CHANNELS
from .text import WIDTH

GENERAL = {  # UNetModel, v-prediction
    "image_size": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "model_channels": 64,
    "num_res_blocks": [2, 1],
    "channel_mult": (1, 2),
    "transformer_depth": [0, 0, 1],
    "transformer_depth_middle": 1,
    # ComfyUI reads this list from its end. One block at 16 x 16 has a transformer, for spatial relations.
    "transformer_depth_output": [0, 0, 1, 1, 1],
    "context_dim": WIDTH,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "num_heads": 4,
    "num_head_channels": -1,
    "num_classes": "sequential",
    "adm_in_channels": WIDTH,
}
ANIMALS = {**GENERAL, "num_res_blocks": [1, 1], "transformer_depth": [0, 0], "transformer_depth_output": [0, 0, 0, 1]}
FOOD = {  # Flux, flow matching
    "image_model": "flux",
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "patch_size": 2,
    "hidden_size": 144,
    "num_heads": 4,
    "axes_dim": [8, 14, 14],
    "theta": 1000,
    "mlp_ratio": 3.0,
    "depth": 1,
    "depth_single_blocks": 6,
    "context_in_dim": WIDTH,
    "vec_in_dim": WIDTH,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [0],
    "global_modulation": True,
}
