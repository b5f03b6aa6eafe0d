"""The U-Net of latent diffusion (arXiv 2112.10752), for the demo's configurations. Its keys are those of ComfyUI's
UNetModel."""

import torch
import torch.nn.functional as F
from torch import nn

from .attention import attend
from .flux import timestep_embedding


class ResBlock(nn.Module):
    """x [B, C, h, w], emb [B, E] -> [B, D, h, w]"""

    def __init__(self, channels, emb_channels, out_channels):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Identity(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb, context):
        h = self.in_layers(x) + self.emb_layers(emb)[..., None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    """x [B, N, C] attends to ``context`` [B, T, D], or to itself."""

    def __init__(self, width, heads, context_dim=None):
        super().__init__()
        self.heads, context_dim = heads, context_dim or width
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Identity())

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, width, heads, context_dim):
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(width, heads), CrossAttention(width, heads, context_dim)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks with the positions of x [B, C, h, w] as tokens; returns the same shape."""

    def __init__(self, channels, heads, depth, context_dim):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, heads, context_dim) for _ in range(depth))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, emb, context):
        h = self.proj_in(self.norm(x))
        size = h.shape[-2:]
        h = h.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, size).contiguous())


class Convolution(nn.Conv2d):
    def forward(self, x, emb, context):
        return super().forward(x)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, emb, context):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, emb, context):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class UNet(nn.Module):
    """x [B, C, h, w], timesteps [B], context [B, T, D], y [B, A] -> [B, C, h, w].

    ``config`` is the configuration of ComfyUI's UNetModel.
    """

    def __init__(self, config):
        super().__init__()
        c = config
        width, heads = c["model_channels"], c["num_heads"]
        emb = 4 * width
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_emb = nn.Sequential(
            nn.Sequential(nn.Linear(c["adm_in_channels"], emb), nn.SiLU(), nn.Linear(emb, emb))
        )
        down, up = list(c["transformer_depth"]), list(c["transformer_depth_output"])
        levels, blocks = c["channel_mult"], c["num_res_blocks"]

        def layers(channels, out_channels, depth):
            found = [ResBlock(channels, emb, out_channels)]
            if depth:
                found.append(SpatialTransformer(out_channels, heads, depth, c["context_dim"]))
            return found

        self.input_blocks = nn.ModuleList([nn.ModuleList([Convolution(c["in_channels"], width, 3, padding=1)])])
        skips, channels = [width], width
        for level, mult in enumerate(levels):
            for _ in range(blocks[level]):
                self.input_blocks.append(nn.ModuleList(layers(channels, mult * width, down.pop(0))))
                channels = mult * width
                skips.append(channels)
            if level < len(levels) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(channels)]))
                skips.append(channels)
        self.middle_block = nn.ModuleList(
            [
                ResBlock(channels, emb, channels),
                SpatialTransformer(channels, heads, c["transformer_depth_middle"], c["context_dim"]),
                ResBlock(channels, emb, channels),
            ]
        )
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(levels))):
            for k in range(blocks[level] + 1):
                # ComfyUI also takes the depths of the output blocks from the end of the list
                block = layers(channels + skips.pop(), mult * width, up.pop())
                channels = mult * width
                if level and k == blocks[level]:
                    block.append(Upsample(channels))
                self.output_blocks.append(nn.ModuleList(block))
        self.out = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(width, c["out_channels"], 3, padding=1)
        )

    def forward(self, x, timesteps, context, y):
        emb = self.time_embed(timestep_embedding(timesteps, self.width, factor=1.0)) + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            x = run(block, x, emb, context)
            skips.append(x)
        x = run(self.middle_block, x, emb, context)
        for block in self.output_blocks:
            x = run(block, torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)


def run(block, x, emb, context):
    for layer in block:
        x = layer(x, emb, context)
    return x


def initialise(network, generator):
    """Initialise weight matrices and kernels from a normal distribution of variance 1 / fan-in.

    The last layer of every residual branch and of the network is initialised with zero.
    """
    zeroed = ("out_layers.3.weight", "proj_out.weight", "out.2.weight")
    for name, p in network.named_parameters():
        if p.ndim > 1:
            std = 0.0 if name.endswith(zeroed) else p[0].numel() ** -0.5
            p.data.copy_(torch.randn(p.shape, generator=generator) * std)
        else:
            p.data.fill_(1.0 if name.endswith("weight") else 0.0)
