"""The image-text encoder as a ComfyUI CLIP_VISION."""

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
from .comfy_text import encoder_dtype
from .text import TextModel, token_rows
from .vision import CONFIG, EMBED, WIDTH, Stem


class Layer(comfy.clip_model.CLIPLayer):
    """ComfyUI's CLIP layer without its in-place additions, which block gradients."""

    def forward(
        self, x: Tensor, mask: Tensor | None = None, optimized_attention: Callable[..., Tensor] | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask, optimized_attention)
        return x + self.mlp(self.layer_norm2(x))


def replace_stem_and_layers(tower: comfy.clip_model.CLIPVisionModelProjection, operations: Operations) -> None:
    """Replace the stem and the layer class of ComfyUI's vision tower, in place; the weight names do not change."""
    tower.vision_model.embeddings.patch_embedding = Stem(operations)
    for layer in tower.vision_model.encoder.layers:
        layer.__class__ = Layer


class ChorusEmojiVision(comfy.clip_vision.ClipVisionModel):
    """ComfyUI's CLIP_VISION with the demo's convolutional stem. It also embeds captions, for retrieval."""

    model: comfy.clip_model.CLIPVisionModelProjection

    def __init__(self) -> None:
        super().__init__(CONFIG)
        replace_stem_and_layers(self.model, comfy.ops.manual_cast)
        self.dtype = encoder_dtype()
        self.model.to(self.dtype)
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.model,
            load_device=self.load_device,
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )
        self.text = TextModel().eval().requires_grad_(False)
        self.text_project = nn.Parameter(torch.zeros(WIDTH, EMBED), requires_grad=False)

    def text_embeds(self, captions: Sequence[str]) -> Tensor:
        """Normalized caption embeddings [N, 64] on the CPU."""
        return F.normalize(self.text(token_rows(captions))[2] @ self.text_project, dim=-1)

    def similarity(self, image: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine similarities [B, N] of IMAGE [B, H, W, 3] and N captions."""
        embeds = self.encode_image(image)["image_embeds"].float().cpu()
        return F.normalize(embeds, dim=-1) @ self.text_embeds(captions).T


def make_clip_vision(state_dict: Mapping[str, Tensor]) -> ChorusEmojiVision:
    """A CLIP_VISION from the state dict of an ``ImageText`` (dev/recipes/networks/vision.py)."""
    vision = ChorusEmojiVision()
    for prefix, module in (("image.", vision.model), ("text.", vision.text)):
        part = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        module.load_state_dict(part, strict=True)
    vision.text_project.data = state_dict["text_project"].clone()
    return vision
