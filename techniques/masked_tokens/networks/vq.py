"""The VQ-GAN of aMUSEd (arXiv 2401.01808, section 3): encodes images to grids of token ids and decodes them.

Module names are those of the published state dict (diffusers' VQModel), so the file loads unchanged.

Images are [B, 3, H, W] with values 0..1, not -1..1. Token grids are [B, h, w]; in the published file, h = H // 16.
Everything is computed in float32, as the published config requires (force_upcast).
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....common.operations import Operations
from ....common.weights import check_config, count, load, setting, shape_of

EPS = 1e-6  # of every group norm


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """Sizes, under the names of the published config.json."""

    in_channels: int
    out_channels: int
    latent_channels: int
    vq_embed_dim: int
    num_vq_embeddings: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int = 32

    @property
    def downscale(self) -> int:
        """Pixels along one side of a token."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> "VQConfig":
        """The sizes from the weights, and norm_num_groups from ``config`` (a config.json).

        Sizes in ``config`` must agree with the weights.
        """
        # JSON has no tuples
        config = {key: tuple(v) if isinstance(v, list) else v for key, v in (config or {}).items()}
        sizes = sizes_from_weights(state_dict)
        # further options of a config, with the values of the published model
        check_config(config, {**sizes, "act_fn": "silu", "norm_type": "group", "mid_block_add_attention": False})
        groups = setting(config, "norm_num_groups", cls.norm_num_groups)
        if any(channels % groups for channels in sizes["block_out_channels"]):
            raise ValueError(
                f"{sizes['block_out_channels']} channels cannot be split into {groups} groups; "
                "set norm_num_groups in the config"
            )
        return cls(**sizes, norm_num_groups=groups)


def sizes_from_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    def shape(name: str, dims: int = 4) -> torch.Size:
        return shape_of(state_dict, name, dims, "aMUSEd's VQ-GAN")

    codes, code_size = shape("quantize.embedding.weight", 2)
    # at least 1, so that the error names the first block if there is none
    blocks = range(max(1, count(state_dict, "encoder.down_blocks.")))
    return {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "latent_channels": shape("encoder.conv_out.weight")[0],
        "vq_embed_dim": code_size,
        "num_vq_embeddings": codes,
        "block_out_channels": tuple(shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in blocks),
        "layers_per_block": count(state_dict, "encoder.down_blocks.0.resnets."),
    }


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out: int, groups: int, operations: Operations) -> None:
        super().__init__()
        self.norm1 = operations.GroupNorm(groups, channels, eps=EPS)
        self.conv1 = operations.Conv2d(channels, out, 3, padding=1)
        self.norm2 = operations.GroupNorm(groups, out, eps=EPS)
        self.conv2 = operations.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = operations.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """A convolution that halves height and width; pads with zeros at the right and the bottom only."""

    def __init__(self, channels: int, operations: Operations) -> None:
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, channels: int, operations: Operations) -> None:
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def block(
    channels: int, out: int, number: int, groups: int, operations: Operations, **sampler: nn.Module
) -> nn.Sequential:
    """``number`` residual blocks, then an optional ``sampler`` under its name."""
    widths = [channels] + [out] * (number - 1)
    parts: dict[str, list[nn.Module]] = {"resnets": [ResnetBlock(width, out, groups, operations) for width in widths]}
    parts |= {name: [module] for name, module in sampler.items()}
    return nn.Sequential(OrderedDict((name, nn.Sequential(*modules)) for name, modules in parts.items()))


class Encoder(nn.Module):
    def __init__(self, config: VQConfig, operations: Operations) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = operations.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.Sequential()
        for i, (channels, out) in enumerate(zip((widths[0], *widths), widths)):
            sampler = {"downsamplers": Downsample(out, operations)} if i < len(widths) - 1 else {}
            self.down_blocks.append(block(channels, out, config.layers_per_block, groups, operations, **sampler))
        self.mid_block = block(widths[-1], widths[-1], 2, groups, operations)
        self.conv_norm_out = operations.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = operations.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.down_blocks(self.conv_in(x)))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, config: VQConfig, operations: Operations) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = operations.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = block(widths[0], widths[0], 2, groups, operations)
        self.up_blocks = nn.Sequential()
        for i, (channels, out) in enumerate(zip((widths[0], *widths), widths)):
            sampler = {"upsamplers": Upsample(out, operations)} if i < len(widths) - 1 else {}
            self.up_blocks.append(block(channels, out, config.layers_per_block + 1, groups, operations, **sampler))
        self.conv_norm_out = operations.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = operations.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up_blocks(self.mid_block(self.conv_in(x)))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Codebook(nn.Module):
    def __init__(self, codes: int, size: int, operations: Operations) -> None:
        super().__init__()
        self.embedding = operations.Embedding(codes, size)

    def lookup(self, ids: Tensor) -> Tensor:
        """The codes [B, C, h, w] of ``ids`` [B, h, w]."""
        return self.embedding(ids).float().movedim(-1, 1).contiguous()

    def nearest(self, x: Tensor) -> Tensor:
        """The ids [B, h, w] of the codes with the smallest Euclidean distance to ``x`` [B, C, h, w]."""
        # read through the layer, because it casts and moves its weights
        codes = self.embedding(torch.arange(self.embedding.num_embeddings, device=x.device)).float()
        x = x.movedim(1, -1)
        return torch.cdist(x.reshape(-1, x.shape[-1]), codes).argmin(1).reshape(x.shape[:-1])


class VQGAN(nn.Module):
    """Encodes images to token ids and decodes them."""

    def __init__(self, config: VQConfig, operations: Operations = torch.nn) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, operations)
        self.quant_conv = operations.Conv2d(config.latent_channels, config.vq_embed_dim, 1)
        self.quantize = Codebook(config.num_vq_embeddings, config.vq_embed_dim, operations)
        self.post_quant_conv = operations.Conv2d(config.vq_embed_dim, config.latent_channels, 1)
        self.decoder = Decoder(config, operations)

    def encode(self, images: Tensor) -> Tensor:
        """Token ids [B, h, w] of ``images`` [B, 3, H, W], 0..1; sides are rounded down to whole tokens."""
        return self.quantize.nearest(self.quant_conv(self.encoder(images.float())))

    def decode(self, tokens: Tensor) -> Tensor:
        """Images [B, 3, H, W] of token ids [B, h, w]; values may be slightly outside 0..1."""
        return self.decoder(self.post_quant_conv(self.quantize.lookup(tokens)))


def load_vq(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, operations: Operations = torch.nn
) -> VQGAN:
    """The published VQ-GAN from its state dict and its config.json, if it has one."""
    return load(VQGAN, VQConfig.from_state_dict(state_dict, config), state_dict, operations)
