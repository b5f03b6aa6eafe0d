"""The transformer of Flux with shared modulation, for the demo's configuration. Its keys are those of ComfyUI's Flux
class.

The tokens are patches of the latent and the states of the text. They pass one double-stream block and then
single-stream blocks.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .attention import attend


class MLPEmbedder(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(width, hidden), nn.Linear(hidden, hidden)

    def forward(self, x):
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """Conditioning vector [B, C] -> ``count`` tensors [B, 1, C]."""

    def __init__(self, width, count):
        super().__init__()
        self.count, self.lin = count, nn.Linear(width, count * width, bias=False)

    def forward(self, vector):
        return self.lin(F.silu(vector))[:, None].chunk(self.count, dim=-1)


class QKNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query_norm, self.key_norm = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, q, k):
        # under autocast, torch has no fused norm for mixed dtypes
        return self.query_norm(q.float()), self.key_norm(k.float())


class SelfAttention(nn.Module):
    def __init__(self, width, heads, bias):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width, bias=bias)
        self.norm, self.proj = QKNorm(width // heads), nn.Linear(width, width)

    def heads_of(self, x):
        q, k, v = split_heads(self.qkv(x), self.heads)
        return *self.norm(q, k), v


def split_heads(qkv, heads):
    """Split [B, N, 3 C] into q, k and v, each [B, H, N, C/H]."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def rotate(x, angles):
    """Rotary embedding: rotate pairs of channels of x [B, H, N, D] by ``angles`` [N, D/2]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x)


def attention(q, k, v, angles):
    """Attention of q, k and v [B, H, N, D] with rotary embedding -> [B, N, C], where C = H D."""
    x = attend(rotate(q, angles).to(v), rotate(k, angles).to(v), v)
    return x.transpose(1, 2).flatten(2)


def modulate(x, shift, scale):
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


class DoubleStreamBlock(nn.Module):
    def __init__(self, width, heads, mlp_ratio, bias):
        super().__init__()
        inner = int(width * mlp_ratio)
        mlp = lambda: nn.Sequential(nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width))  # noqa: E731
        self.img_attn, self.img_mlp = SelfAttention(width, heads, bias), mlp()
        self.txt_attn, self.txt_mlp = SelfAttention(width, heads, bias), mlp()

    def forward(self, img, txt, img_mod, txt_mod, angles):
        text = self.txt_attn.heads_of(modulate(txt, *txt_mod[:2]))
        image = self.img_attn.heads_of(modulate(img, *img_mod[:2]))
        joined = attention(*(torch.cat(pair, dim=2) for pair in zip(text, image)), angles)
        txt_part, img_part = joined.split([txt.shape[1], img.shape[1]], dim=1)
        img = img + img_mod[2] * self.img_attn.proj(img_part)
        img = img + img_mod[5] * self.img_mlp(modulate(img, *img_mod[3:5]))
        txt = txt + txt_mod[2] * self.txt_attn.proj(txt_part)
        return img, txt + txt_mod[5] * self.txt_mlp(modulate(txt, *txt_mod[3:5]))


class SingleStreamBlock(nn.Module):
    def __init__(self, width, heads, mlp_ratio):
        super().__init__()
        self.heads, self.widths = heads, (3 * width, int(width * mlp_ratio))
        self.linear1 = nn.Linear(width, sum(self.widths))
        self.linear2 = nn.Linear(width + self.widths[1], width)
        self.norm = QKNorm(width // heads)

    def forward(self, x, mod, angles):
        qkv, mlp = self.linear1(modulate(x, *mod[:2])).split(self.widths, dim=-1)
        q, k, v = split_heads(qkv, self.heads)
        joined = torch.cat([attention(*self.norm(q, k), v, angles), F.gelu(mlp, approximate="tanh")], dim=-1)
        return x + mod[2] * self.linear2(joined)


class LastLayer(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, vector):
        return self.linear(modulate(x, *self.adaLN_modulation(vector)[:, None].chunk(2, dim=-1)))


class Flux(nn.Module):
    """x [B, C, h, w], timesteps [B] in 0..1, context [B, T, D], y [B, V] -> velocity [B, C, h, w].

    ``config`` is the configuration of ComfyUI's Flux class.
    """

    def __init__(self, config):
        super().__init__()
        c = config
        width, heads, patch = c["hidden_size"], c["num_heads"], c["patch_size"]
        self.patch, self.axes, self.theta, self.text_axes = patch, c["axes_dim"], c["theta"], c["txt_ids_dims"]
        self.img_in = nn.Linear(c["in_channels"] * patch**2, width)
        self.time_in, self.vector_in = MLPEmbedder(256, width), MLPEmbedder(c["vec_in_dim"], width)
        self.txt_in = nn.Linear(c["context_in_dim"], width)
        self.double_stream_modulation_img, self.double_stream_modulation_txt = (
            Modulation(width, 6),
            Modulation(width, 6),
        )
        self.single_stream_modulation = Modulation(width, 3)
        shape = width, heads, c["mlp_ratio"]
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(*shape, c["qkv_bias"]) for _ in range(c["depth"]))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(*shape) for _ in range(c["depth_single_blocks"]))
        self.final_layer = LastLayer(width, c["out_channels"] * patch**2)

    def forward(self, x, timesteps, context, y):
        h, w = x.shape[2] // self.patch, x.shape[3] // self.patch
        img = F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)
        img, txt = self.img_in(img), self.txt_in(context)
        vector = self.time_in(timestep_embedding(timesteps, 256)) + self.vector_in(y)
        angles = self.angles(txt.shape[1], h, w, x.device)
        img_mod, txt_mod = self.double_stream_modulation_img(vector), self.double_stream_modulation_txt(vector)
        for block in self.double_blocks:
            img, txt = block(img, txt, img_mod, txt_mod, angles)
        joined, mod, start = torch.cat([txt, img], dim=1), self.single_stream_modulation(vector), txt.shape[1]
        for block in self.single_blocks:
            joined = block(joined, mod, angles)
        out = self.final_layer(joined[:, start:], vector)
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (h, w)), self.patch)

    def angles(self, text, h, w, device):
        """Rotary angles [text + h w, D/2]: positions (index, row, column) times frequencies.

        The position of a text token is its index in the prompt, on the axes ``text_axes``; on the other axes it is 0.
        """
        text_ids = torch.zeros(text, len(self.axes))
        for axis in self.text_axes:
            text_ids[:, axis] = torch.arange(text)
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        image_ids = torch.stack([torch.zeros(h, w), rows, columns], dim=-1).flatten(0, 1)
        ids = torch.cat([text_ids, image_ids]).double()
        parts = [
            ids[:, k, None] / self.theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            for k, dim in enumerate(self.axes)
        ]
        return torch.cat(parts, dim=-1).float().to(device)


def timestep_embedding(t, width, factor=1000.0):
    """Embedding [B, width] of timesteps t [B]: cosines of ``factor`` * t times each frequency, then the sines."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angles = factor * t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def initialise(network, generator):
    """Initialise weight matrices from a normal distribution of variance 1 / fan-in; modulations and the last layer with
    zero."""
    zeroed = ("modulation_img.lin.weight", "modulation_txt.lin.weight", "stream_modulation.lin.weight")
    for name, p in network.named_parameters():
        if p.ndim > 1:
            zero = name.endswith(zeroed) or name.startswith("final_layer")
            p.data.copy_(torch.randn(p.shape, generator=generator) * (0.0 if zero else p[0].numel() ** -0.5))
        else:
            p.data.fill_(1.0 if name.endswith("norm.weight") else 0.0)
