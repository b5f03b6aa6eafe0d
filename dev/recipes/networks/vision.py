"""The image-text encoder in plain torch: CLIP's vision transformer on the demo's stem, and a text tower for retrieval.

The weight names are those of ComfyUI's CLIPVisionModelProjection.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ....demo.text import TextModel, read
from ....demo.vision import EMBED, GRID, HEADS, LAYERS, WIDTH, Stem


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(WIDTH))
        self.patch_embedding = Stem()
        self.position_embedding = nn.Embedding(GRID**2 + 1, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(self.patch_embedding(x), "b c h w -> b (h w) c")
        x = torch.cat([self.class_embedding.to(x).expand(len(x), 1, -1), x], dim=1)
        return x + self.position_embedding.weight


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(proj(x), "b n (h d) -> b h n d", h=HEADS) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm1, self.self_attn = nn.LayerNorm(WIDTH), Attention()
        self.layer_norm2, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The states of the last layer [B, 65, 96] and of all L layers [B, L, 65, 96]."""
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return x, torch.stack(found, dim=1)


class VisionModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.pre_layrnorm = nn.LayerNorm(WIDTH)  # ComfyUI's spelling
        self.encoder = Transformer()
        self.post_layernorm = nn.LayerNorm(WIDTH)


class ImageTower(nn.Module):
    """The vision tower: pixel_values [B, 3, 128, 128] in -1..1 -> four outputs.

    The outputs are the states [B, 65, 96], the states of all layers [B, 3, 65, 96], the embedding [B, 64] and None.
    ComfyUI's class returns the same with ``intermediate_output="all"``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.vision_model = VisionModel()
        self.visual_projection = nn.Linear(WIDTH, EMBED, bias=False)

    def forward(
        self, pixel_values: Tensor, intermediate_output: int | str = "all"
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        model = self.vision_model
        x, layers = model.encoder(model.pre_layrnorm(model.embeddings(pixel_values)))
        return x, layers, self.visual_projection(model.post_layernorm(x[:, 0])), None


class ImageText(nn.Module):
    """Both towers. They embed images [B, 3, 128, 128] in -1..1 and captions as unit vectors [B, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = ImageTower(), TextModel()
        self.text_project = nn.Parameter(torch.randn(WIDTH, EMBED) * WIDTH**-0.5)

    def image_embeds(self, x: Tensor) -> Tensor:
        return F.normalize(self.image(x)[2].float(), dim=-1)

    def text_embeds(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.text(tokens)[2].float() @ self.text_project, dim=-1)

    def similarity(self, x: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine similarities [B, N] of images with N captions."""
        summary = read(self.text, captions)[1]
        return self.image_embeds(x) @ F.normalize(summary.float() @ self.text_project, dim=-1).T
