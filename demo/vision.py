"""Sizes and stem of the image-text encoder: CLIP's vision transformer on a convolutional stem, and a text tower for
retrieval.

The weight names are those of ComfyUI's CLIPVisionModelProjection.
"""

from torch import nn

from ..common.operations import Operations

WIDTH, EMBED, LAYERS, HEADS, GRID = 96, 64, 3, 3, 8
STEM = (16, 32, 64, WIDTH)
CONFIG = {
    "model_type": "clip_vision_model",
    "image_size": 128,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_size": WIDTH,
    "intermediate_size": 3 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": EMBED,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


class Stem(nn.Sequential):
    """[B, 3, H, W] -> [B, 96, 8, 8], in place of CLIP's patch projection.

    Consists of strided convolutions with the output channels STEM and a final convolution without stride.
    """

    def __init__(self, operations: Operations = nn) -> None:
        layers, last = [], 3
        for c in STEM:
            layers += [operations.Conv2d(last, c, 3, stride=2, padding=1), operations.GroupNorm(8, c), nn.SiLU()]
            last = c
        super().__init__(*layers, operations.Conv2d(last, WIDTH, 3, padding=1))
