"""The image-text encoder as the host's CLIP_VISION."""

from collections.abc import Callable, Mapping, Sequence

import comfy.clip_model
import comfy.clip_vision
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .text import TextModel, token_rows
from .vision import CONFIG, EMBED, WIDTH, Stem


class Layer(comfy.clip_model.CLIPLayer):
    """The host's layer without its in-place additions, through which no gradient flows."""

    def forward(
        self, x: Tensor, mask: Tensor | None = None, optimized_attention: Callable[..., Tensor] | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask, optimized_attention)
        return x + self.mlp(self.layer_norm2(x))


class ChorusEmojiVision(comfy.clip_vision.ClipVisionModel):
    """The host's CLIP_VISION with our stem; it also embeds captions, for retrieval."""

    model: comfy.clip_model.CLIPVisionModelProjection

    def __init__(self) -> None:
        super().__init__(CONFIG)
        tower = self.model.vision_model
        tower.embeddings.patch_embedding = Stem(comfy.ops.manual_cast)
        for layer in tower.encoder.layers:
            layer.__class__ = Layer
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
        """[N, 64], normalised; on the CPU."""
        return F.normalize(self.text(token_rows(captions))[2] @ self.text_project, dim=-1)

    def similarity(self, image: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosines [B, N] of IMAGE [B, H, W, 3] with N captions."""
        embeds = self.encode_image(image)["image_embeds"].float().cpu()
        return F.normalize(embeds, dim=-1) @ self.text_embeds(captions).T


def make_clip_vision(state_dict: Mapping[str, Tensor]) -> ChorusEmojiVision:
    """The host's CLIP_VISION object from the state dict of an ``ImageText``."""
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}  # noqa: E731
    found = ChorusEmojiVision()
    found.model.load_state_dict(part("image."), strict=True)
    found.text.load_state_dict(part("text."), strict=True)
    found.text_project.data = state_dict["text_project"].clone()
    return found
