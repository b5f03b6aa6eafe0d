"""The U-ViT of aMUSEd (arXiv 2401.01808, section 3): logits over the codebook from token ids and text.

The network has convolutional blocks at both ends and a transformer between them. There is no position embedding: the
convolutions encode positions. Module names are those of the published state dicts (diffusers' UVit2DModel), so the
files load unchanged.

``UViT.condition`` computes all features that depend only on the text and the micro-conditioning, once per run:

    conditioning = uvit.condition(text, pooled, micro)
    logits = uvit(tokens, conditioning)  # every step

Shapes: B batch, h×w token grid, N tokens of the transformer, L text tokens.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ....common.operations import Operations
from ....common.weights import check_config, count, load, setting, shape_of
from .uvit_blocks import (
    BlockConditioning,
    BlockSizes,
    KeyValue,
    LayerConditioning,
    TransformerLayer,
    UViTBlock,
    convolve,
)

MICRO_VALUES = 5  # width, height, crop's top, crop's left, aesthetic score
HEAD_SIZE = 64  # channels per head, if no config specifies the number of heads


@dataclass(frozen=True, kw_only=True)
class UViTConfig:
    """Sizes, under the names of the published config.json."""

    hidden_size: int
    encoder_hidden_size: int
    cond_embed_dim: int
    micro_cond_encode_dim: int
    vocab_size: int
    codebook_size: int
    in_channels: int
    block_out_channels: int
    num_res_blocks: int
    block_num_heads: int
    downsample: bool
    upsample: bool
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float = 1e-6
    sample_size: int = 16

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> "UViTConfig":
        """The sizes from the weights; ``config`` (a config.json) must agree with them.

        The weights do not determine these values, which are read from ``config``:
        - the numbers of heads (default: heads of 64 channels)
        - the width of the pooled text (default: the width of the text)
        - layer_norm_eps
        - sample_size, the tokens along one side of an image (default: 16 along one side of the transformer's grid)
        """
        config = config or {}
        sizes = sizes_from_weights(state_dict)
        pooled, micro = split_cond(sizes.pop("cond"), setting(config, "cond_embed_dim", sizes["encoder_hidden_size"]))
        sizes |= {"cond_embed_dim": pooled, "micro_cond_encode_dim": micro}
        # further options of a config; they are the same in all published models
        implied = {"micro_cond_embed_dim": MICRO_VALUES * micro, "use_bias": False, "ln_elementwise_affine": True}
        check_config(config, sizes | implied)
        return cls(
            **sizes,
            block_num_heads=heads(sizes["block_out_channels"], config, "block_num_heads"),
            num_attention_heads=heads(sizes["hidden_size"], config, "num_attention_heads"),
            layer_norm_eps=setting(config, "layer_norm_eps", cls.layer_norm_eps),
            sample_size=setting(config, "sample_size", cls.sample_size * (2 if sizes["downsample"] else 1)),
        )


def sizes_from_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    def shape(name: str, dims: int) -> torch.Size:
        return shape_of(state_dict, name, dims, "aMUSEd's U-ViT")

    hidden_size, encoder_hidden_size = shape("encoder_proj.weight", 2)
    vocab_size, in_channels = shape("embed.embeddings.weight", 2)
    return {
        "hidden_size": hidden_size,
        "encoder_hidden_size": encoder_hidden_size,
        "cond": shape("cond_embed.linear_1.weight", 2)[1],
        "vocab_size": vocab_size,
        "in_channels": in_channels,
        "block_out_channels": shape("embed.conv.weight", 4)[0],
        "num_res_blocks": count(state_dict, "down_block.res_blocks."),
        "downsample": "down_block.downsample.conv.weight" in state_dict,
        "upsample": "up_block.upsample.conv.weight" in state_dict,
        "num_hidden_layers": count(state_dict, "transformer_layers."),
        "intermediate_size": shape("transformer_layers.0.ff.net.2.weight", 2)[1],
        "codebook_size": shape("mlm_layer.conv2.weight", 4)[0],
    }


def split_cond(width: int, pooled: int) -> tuple[int, int]:
    """The widths of the pooled text and of one micro-conditioning value, from the width of their concatenation."""
    micro, rest = divmod(width - pooled, 2 * MICRO_VALUES)  # cosines and sines of each value
    if micro < 1 or rest:
        raise ValueError(
            f"cond_embed.linear_1.weight has {width} inputs, {pooled} of them for the pooled text; the other"
            f" {width - pooled} cannot be divided among {MICRO_VALUES} micro-conditioning values;"
            " set cond_embed_dim in the config"
        )
    return pooled, 2 * micro


def heads(width: int, config: Mapping[str, Any], name: str) -> int:
    number = setting(config, name, width // HEAD_SIZE)
    if number < 1 or width % number:
        raise ValueError(f"{width} channels cannot be split into {number} heads; set {name} in the config")
    return number


class Conditioning(NamedTuple):
    """The features that are the same in every sampling step."""

    down: BlockConditioning
    layers: list[LayerConditioning]
    up: BlockConditioning

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].text.key.dtype


def sinusoid(values: Tensor, size: int) -> Tensor:
    """Each of ``values`` [...] as ``size`` // 2 cosines and as many sines, in float32: [..., size]."""
    half = size // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=values.device))
    angles = values.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TokenEmbedding(nn.Module):
    def __init__(self, config: UViTConfig, operations: Operations) -> None:
        super().__init__()
        self.embeddings = operations.Embedding(config.vocab_size, config.in_channels)
        self.layer_norm = operations.RMSNorm(config.in_channels, eps=config.layer_norm_eps)
        self.conv = operations.Conv2d(config.in_channels, config.block_out_channels, 1, bias=False)

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return convolve(self.conv, self.layer_norm(self.embeddings(tokens).to(dtype)))


class ConditionEmbedding(nn.Module):
    def __init__(self, width: int, hidden_size: int, operations: Operations) -> None:
        super().__init__()
        self.linear_1 = operations.Linear(width, hidden_size, bias=False)
        self.linear_2 = operations.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, cond: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(cond)))


class LogitsHead(nn.Module):
    """Logits over the codebook from a grid of features."""

    def __init__(self, config: UViTConfig, operations: Operations) -> None:
        super().__init__()
        self.conv1 = operations.Conv2d(config.block_out_channels, config.in_channels, 1, bias=False)
        self.layer_norm = operations.RMSNorm(config.in_channels, eps=config.layer_norm_eps)
        self.conv2 = operations.Conv2d(config.in_channels, config.codebook_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.conv2, self.layer_norm(convolve(self.conv1, x)))


class UViT(nn.Module):
    """Logits over the codebook for every token of an image, masked or known."""

    def __init__(self, config: UViTConfig, operations: Operations = torch.nn) -> None:
        super().__init__()
        size, channels, eps = config.hidden_size, config.block_out_channels, config.layer_norm_eps
        self.config = config
        self.encoder_proj = operations.Linear(config.encoder_hidden_size, size, bias=False)
        self.encoder_proj_layer_norm = operations.RMSNorm(size, eps=eps)
        width = config.cond_embed_dim + MICRO_VALUES * config.micro_cond_encode_dim
        block = BlockSizes(channels, size, config.block_num_heads, eps, config.num_res_blocks)
        layer = (size, config.intermediate_size, config.num_attention_heads, eps)
        self.cond_embed = ConditionEmbedding(width, size, operations)
        self.embed = TokenEmbedding(config, operations)
        self.down_block = UViTBlock(block, operations, downsample=config.downsample)
        self.project_to_hidden_norm = operations.RMSNorm(channels, eps=eps)
        self.project_to_hidden = operations.Linear(channels, size, bias=False)
        layers = [TransformerLayer(*layer, operations) for _ in range(config.num_hidden_layers)]
        self.transformer_layers = nn.ModuleList(layers)
        self.project_from_hidden_norm = operations.RMSNorm(size, eps=eps)
        self.project_from_hidden = operations.Linear(size, channels, bias=False)
        self.up_block = UViTBlock(block, operations, upsample=config.upsample)
        self.mlm_layer = LogitsHead(config, operations)

    def condition(self, text: Tensor, pooled: Tensor, micro: Tensor) -> Conditioning:
        """The features that are the same in every sampling step.

        text    [B, L, encoder_hidden_size]: the text encoder's states before its last layer, without its final norm
        pooled  [B, cond_embed_dim]: the text encoder's projected sentence embedding
        micro   [B, 5]: width, height, crop top and crop left in pixels; aesthetic score, usually 6

        The network computes in the dtype of ``text``.
        """
        context = self.encoder_proj_layer_norm(self.encoder_proj(text))
        micro = sinusoid(micro, self.config.micro_cond_encode_dim).flatten(1)
        cond = self.cond_embed(torch.cat([pooled.to(text), micro.to(text)], dim=-1))
        cond = F.silu(cond)  # the input of every conditioning layer
        return Conditioning(
            self.down_block.condition(context, cond),
            [layer.condition(context, cond) for layer in cast(Iterable[TransformerLayer], self.transformer_layers)],
            self.up_block.condition(context, cond),
        )

    def forward(
        self, tokens: Tensor, conditioning: Conditioning, references: Sequence[KeyValue] | None = None
    ) -> Tensor:
        """Logits [B, codebook_size, h, w] of ``tokens``: ids [B, h, w], with vocab_size − 1 at masked tokens.

        ``references``: for each transformer layer, keys and values of other images (see ``keys_values``), which its
        self-attention reads in addition to those of ``tokens``.
        """
        height, width = tokens.shape[1:]
        x, grid_height = self._project(tokens, conditioning)
        for layer, part, reference in zip(
            self.transformer_layers, conditioning.layers, references or [None] * len(conditioning.layers)
        ):
            x = layer(x, part, reference)
        x = self.project_from_hidden(self.project_from_hidden_norm(x))
        x = rearrange(x, "b (h w) c -> b h w c", h=grid_height)

        x = self.up_block(x, conditioning.up)[:, :height, :width]  # crops the padding of an odd side
        return self.mlm_layer(x).movedim(-1, 1)

    def keys_values(self, tokens: Tensor, conditioning: Conditioning) -> list[KeyValue]:
        """For each transformer layer, the keys and values of its self-attention on ``tokens``: ids [B, h, w]."""
        x, _ = self._project(tokens, conditioning)
        found: list[KeyValue] = []
        for layer, part in zip(self.transformer_layers, conditioning.layers):
            x = layer(x, part, record=found)
        return found

    def _project(self, tokens: Tensor, conditioning: Conditioning) -> tuple[Tensor, int]:
        """The input [B, N, hidden_size] of the transformer, and the height of its grid."""
        x = self.down_block(self.embed(tokens, conditioning.dtype), conditioning.down)
        grid = rearrange(x, "b h w c -> b (h w) c")
        return self.project_to_hidden(self.project_to_hidden_norm(grid)), x.shape[1]


def load_uvit(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, operations: Operations = torch.nn
) -> UViT:
    """A published transformer from its state dict and its config.json, if it has one."""
    return load(UViT, UViTConfig.from_state_dict(state_dict, config), state_dict, operations)
