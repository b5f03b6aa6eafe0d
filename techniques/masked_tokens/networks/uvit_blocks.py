"""Modules of the U-ViT of aMUSEd: convolutional blocks at its ends, transformer layers between them.

Modules that depend on the text or the conditioning vector have two methods. ``condition`` or ``keys_values`` computes
the features of these inputs once for all sampling steps. ``forward`` uses these features. Grids are [B, h, w, C], so
that convolutions receive the channels-last format without a copy. No layer has a bias.

Shapes: B batch, h×w token grid, N tokens of the transformer, L text tokens, C channels, H heads of size D.
"""

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ....common.operations import Operations

ATTENTION_BLOCK_EPS = 1e-6  # of the norms in attention blocks, which ignore layer_norm_eps


class KeyValue(NamedTuple):
    """Keys and values of attention, [B, H, L, D] each."""

    key: Tensor
    value: Tensor

    def joined(self, other: "KeyValue") -> "KeyValue":
        """These keys and values, followed by those of ``other``."""
        return KeyValue(torch.cat([self.key, other.key], dim=2), torch.cat([self.value, other.value], dim=2))


class Modulation(NamedTuple):
    """Scale and shift [B, C] of normalized features: x · scale + shift; scale is 1 + the layer's output."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, output: Tensor) -> "Modulation":
        scale, shift = output.chunk(2, dim=-1)
        return cls(1 + scale, shift)

    def __call__(self, x: Tensor) -> Tensor:
        scale, shift = (t.reshape(len(t), *[1] * (x.ndim - 2), -1) for t in self)
        return torch.addcmul(shift, x, scale)


class BlockConditioning(NamedTuple):
    """The conditioning of one convolutional block.

    For each pair of a ConvNeXt block and an attention block: the modulation of the ConvNeXt block, and the keys and
    values of the text for both attentions of the attention block.
    """

    modulations: list[Modulation]
    texts: list[tuple[KeyValue, KeyValue]]


class LayerConditioning(NamedTuple):
    """The conditioning of one transformer layer: a modulation per norm, and the text's keys and values."""

    norm1: Modulation
    norm2: Modulation
    norm3: Modulation
    text: KeyValue


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a convolution to a grid, [B, h, w, C] in and out."""
    return conv(x.movedim(-1, 1)).movedim(1, -1)


class Attention(nn.Module):
    """Multi-head attention with keys and values that are computed in advance."""

    def __init__(self, channels: int, context: int, num_heads: int, operations: Operations) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = operations.Linear(channels, channels, bias=False)
        self.to_k = operations.Linear(context, channels, bias=False)
        self.to_v = operations.Linear(context, channels, bias=False)
        self.to_out = nn.ModuleList([operations.Linear(channels, channels, bias=False)])

    def heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)

    def keys_values(self, context: Tensor) -> KeyValue:
        return KeyValue(self.heads(self.to_k(context)), self.heads(self.to_v(context)))

    def forward(self, x: Tensor, context: KeyValue) -> Tensor:
        x = F.scaled_dot_product_attention(self.heads(self.to_q(x)), *context)
        return self.to_out[0](rearrange(x, "b h n d -> b n (h d)"))


class GlobalResponseNorm(nn.Module):
    """Scales each channel by its share of the energy of the grid (ConvNeXt V2, arXiv 2301.00808, section 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        energy = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)  # [B, 1, 1, C]
        share = energy / (energy.mean(-1, keepdim=True) + 1e-6)
        # cast here, because the casting operations cast only the parameters of layers
        return self.gamma.to(x) * (x * share) + self.beta.to(x) + x


class ConvNextBlock(nn.Module):
    """A ConvNeXt V2 block on a grid, modulated after its residual sum."""

    def __init__(self, channels: int, hidden_size: int, eps: float, operations: Operations) -> None:
        super().__init__()
        self.depthwise = operations.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = operations.RMSNorm(channels, eps=eps)
        self.channelwise_linear_1 = operations.Linear(channels, 4 * channels, bias=False)
        self.channelwise_norm = GlobalResponseNorm(4 * channels)
        self.channelwise_linear_2 = operations.Linear(4 * channels, channels, bias=False)
        self.cond_embeds_mapper = operations.Linear(hidden_size, 2 * channels, bias=False)

    def forward(self, x: Tensor, modulation: Modulation) -> Tensor:
        y = self.norm(convolve(self.depthwise, x))
        y = self.channelwise_norm(F.gelu(self.channelwise_linear_1(y)))
        return modulation(x + self.channelwise_linear_2(y))


class AttentionBlock(nn.Module):
    """Two cross attentions to the text on tokens [B, N, C]; the ConvNeXt blocks replace the feed-forward part."""

    def __init__(self, channels: int, hidden_size: int, num_heads: int, operations: Operations) -> None:
        super().__init__()
        narrow = channels != hidden_size
        self.kv_mapper = operations.Linear(hidden_size, channels, bias=False) if narrow else None
        self.norm1 = operations.RMSNorm(channels, eps=ATTENTION_BLOCK_EPS)
        self.attn1 = Attention(channels, channels, num_heads, operations)
        self.norm2 = operations.RMSNorm(channels, eps=ATTENTION_BLOCK_EPS)
        self.attn2 = Attention(channels, channels, num_heads, operations)

    def keys_values(self, context: Tensor) -> tuple[KeyValue, KeyValue]:
        if self.kv_mapper is not None:
            context = self.kv_mapper(F.silu(context))
        return self.attn1.keys_values(context), self.attn2.keys_values(context)

    def forward(self, x: Tensor, texts: tuple[KeyValue, KeyValue]) -> Tensor:
        x = x + self.attn1(self.norm1(x), texts[0])
        return x + self.attn2(self.norm2(x), texts[1])


class Downsample(nn.Module):
    """A norm and a convolution that halves the grid; an odd side is padded with zeros at its end."""

    def __init__(self, channels: int, eps: float, operations: Operations) -> None:
        super().__init__()
        self.norm = operations.RMSNorm(channels, eps=eps)
        self.conv = operations.Conv2d(channels, channels, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        return convolve(self.conv, F.pad(self.norm(x), (0, 0, 0, width % 2, 0, height % 2)))


class Upsample(nn.Module):
    """A norm and a convolution that doubles the grid."""

    def __init__(self, channels: int, eps: float, operations: Operations) -> None:
        super().__init__()
        self.norm = operations.RMSNorm(channels, eps=eps)
        self.conv = operations.ConvTranspose2d(channels, channels, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.conv, self.norm(x))


class BlockSizes(NamedTuple):
    channels: int
    hidden_size: int
    num_heads: int
    eps: float
    pairs: int


class UViTBlock(nn.Module):
    """Pairs of a ConvNeXt block and attention to the text, with optional down- and upsampling of the grid."""

    def __init__(
        self, sizes: BlockSizes, operations: Operations, *, downsample: bool = False, upsample: bool = False
    ) -> None:
        super().__init__()
        channels, hidden_size, num_heads, eps, pairs = sizes
        self.downsample = Downsample(channels, eps, operations) if downsample else None
        convs = [ConvNextBlock(channels, hidden_size, eps, operations) for _ in range(pairs)]
        attentions = [AttentionBlock(channels, hidden_size, num_heads, operations) for _ in range(pairs)]
        self.res_blocks = nn.ModuleList(convs)
        self.attention_blocks = nn.ModuleList(attentions)
        self.upsample = Upsample(channels, eps, operations) if upsample else None

    def condition(self, context: Tensor, cond: Tensor) -> BlockConditioning:
        convs = cast(Iterable[ConvNextBlock], self.res_blocks)
        attentions = cast(Iterable[AttentionBlock], self.attention_blocks)
        return BlockConditioning(
            [Modulation.of(block.cond_embeds_mapper(cond)) for block in convs],
            [block.keys_values(context) for block in attentions],
        )

    def forward(self, x: Tensor, conditioning: BlockConditioning) -> Tensor:
        if self.downsample is not None:
            x = self.downsample(x)
        parts = zip(self.res_blocks, self.attention_blocks, conditioning.modulations, conditioning.texts)
        for conv, attention, modulation, texts in parts:
            x = conv(x, modulation)
            x = attention(x.flatten(1, 2), texts).reshape(x.shape)
        return x if self.upsample is None else self.upsample(x)


class AdaptiveNorm(nn.Module):
    """A norm followed by the scale and shift of the conditioning."""

    def __init__(self, norm: nn.Module, hidden_size: int, operations: Operations) -> None:
        super().__init__()
        self.linear = operations.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.norm = norm

    def forward(self, x: Tensor, modulation: Modulation) -> Tensor:
        return modulation(self.norm(x))


class GEGLU(nn.Module):
    """GELU-gated linear unit (arXiv 2002.05202)."""

    def __init__(self, channels: int, inner: int, operations: Operations) -> None:
        super().__init__()
        self.proj = operations.Linear(channels, 2 * inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int, inner: int, operations: Operations) -> None:
        super().__init__()
        out = operations.Linear(inner, channels, bias=False)
        # the Identity has the index of diffusers' dropout layer, so that the other indices match the published files
        self.net = nn.ModuleList([GEGLU(channels, inner, operations), nn.Identity(), out])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerLayer(nn.Module):
    """Self-attention, cross attention to the text and feed-forward on tokens [B, N, C]."""

    def __init__(self, size: int, inner: int, num_heads: int, eps: float, operations: Operations) -> None:
        super().__init__()
        self.norm1 = AdaptiveNorm(operations.RMSNorm(size, eps=eps), size, operations)
        self.attn1 = Attention(size, size, num_heads, operations)
        self.norm2 = AdaptiveNorm(operations.RMSNorm(size, eps=eps), size, operations)
        self.attn2 = Attention(size, size, num_heads, operations)
        self.norm3 = AdaptiveNorm(operations.LayerNorm(size, eps=eps, bias=False), size, operations)
        self.ff = FeedForward(size, inner, operations)

    def condition(self, context: Tensor, cond: Tensor) -> LayerConditioning:
        norms = (Modulation.of(norm.linear(cond)) for norm in (self.norm1, self.norm2, self.norm3))
        return LayerConditioning(*norms, self.attn2.keys_values(context))

    def forward(
        self,
        x: Tensor,
        conditioning: LayerConditioning,
        reference: KeyValue | None = None,
        record: list[KeyValue] | None = None,
    ) -> Tensor:
        """``reference``: further keys and values for the self-attention, of other images. The layer appends its own to
        ``record``."""
        y = self.norm1(x, conditioning.norm1)
        own = self.attn1.keys_values(y)
        if record is not None:
            record.append(own)
        x = x + self.attn1(y, own if reference is None else own.joined(reference))
        x = x + self.attn2(self.norm2(x, conditioning.norm2), conditioning.text)
        return x + self.ff(self.norm3(x, conditioning.norm3))
