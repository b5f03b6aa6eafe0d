"""The image-text encoder: the host's CLIP vision transformer on a convolutional stem, and a text tower for retrieval."""

from collections.abc import Callable, Mapping, Sequence

import comfy.clip_model
import comfy.clip_vision
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.operations import Operations
from .text import TextModel, token_rows

WIDTH, EMBED = 96, 64
CONFIG = {
    "model_type": "clip_vision_model",
    "image_size": 64,
    "patch_size": 8,
    "num_channels": 3,
    "hidden_size": WIDTH,
    "intermediate_size": 3 * WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": EMBED,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


class Stem(nn.Sequential):
    """[B, 3, 64, 64] -> [B, 96, 8, 8]: three strided convolutions and a plain one in place of the host's single patch projection."""

    def __init__(self, operations: Operations, channels: Sequence[int] = (32, 64, WIDTH)) -> None:
        layers, last = [], 3
        for c in channels:
            layers += [operations.Conv2d(last, c, 3, stride=2, padding=1), operations.GroupNorm(8, c), nn.SiLU()]
            last = c
        super().__init__(*layers, operations.Conv2d(last, WIDTH, 3, padding=1))


class Layer(comfy.clip_model.CLIPLayer):
    """The host's layer without its in-place additions, which autograd cannot undo."""

    def forward(
        self, x: Tensor, mask: Tensor | None = None, optimized_attention: Callable[..., Tensor] | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask, optimized_attention)
        return x + self.mlp(self.layer_norm2(x))


def _furnish(tower: comfy.clip_model.CLIPVisionModelProjection, operations: Operations) -> None:
    """Our stem and layers in the host's CLIPVisionModelProjection; the names of the weights stay the host's."""
    tower.vision_model.embeddings.patch_embedding = Stem(operations)
    for layer in tower.vision_model.encoder.layers:
        layer.__class__ = Layer


def make_tower(
    operations: Operations = comfy.ops.disable_weight_init,
) -> comfy.clip_model.CLIPVisionModelProjection:
    """The host's CLIPVisionModelProjection with our stem, fp32 on the CPU, weights undefined."""
    tower = comfy.clip_model.CLIPVisionModelProjection(CONFIG, torch.float32, "cpu", operations)
    _furnish(tower, operations)
    return tower


def make_clip_vision(state_dict: Mapping[str, Tensor]) -> "ChorusDemoClipVision":
    """The host's CLIP_VISION object. It also carries `text_embeds(captions)` for retrieval."""
    clip_vision = ChorusDemoClipVision()
    part = {k.removeprefix("image."): v for k, v in state_dict.items() if k.startswith("image.")}
    clip_vision.model.load_state_dict(part, strict=True)
    clip_vision.text.load_state_dict(
        {k.removeprefix("text."): v for k, v in state_dict.items() if k.startswith("text.")}
    )
    clip_vision.text_project.data = state_dict["text_project"].clone()
    return clip_vision


class ChorusDemoClipVision(comfy.clip_vision.ClipVisionModel):
    model: comfy.clip_model.CLIPVisionModelProjection

    def __init__(self) -> None:
        super().__init__(CONFIG)
        _furnish(self.model, comfy.ops.manual_cast)
        self.dtype = torch.float32
        self.model.float()
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.model,
            load_device=self.load_device,
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )
        self.text = TextModel().eval().requires_grad_(False)
        self.text_project = nn.Parameter(torch.zeros(WIDTH, EMBED), requires_grad=False)

    def text_embeds(self, captions: Sequence[str]) -> Tensor:
        """[n, 64], normalised; on the CPU."""
        return F.normalize(self.text(token_rows(captions))[2] @ self.text_project, dim=-1)

    def similarity(self, image: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosines [B, n] of IMAGE [B, H, W, 3] with the captions."""
        embeds = self.encode_image(image)["image_embeds"].float().cpu()
        return F.normalize(embeds, dim=-1) @ self.text_embeds(captions).T
