"""The small U-ViT: masked tokens of the small VQ-GAN and a caption in, the tokens out, in aMUSEd's layout.

The objective is aMUSEd's (arXiv 2401.01808, section 3.2): r uniform in 0..1, a share cos(pi r / 2) of the tokens masked,
cross entropy on those. The text encoder is the demo's, frozen.

The committed weights are 5,044 of the 6,000 steps (265,568 canvases): 80 minutes by --minutes on two busy cores, in three
runs. The first 1,789 steps had 32 canvases each, AdamW alone and 192 units in the feed-forward layers, of which the 16
weakest of each layer were then cut; up to step 3,300 attention to the text inside the two convolutional blocks was off.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ...demo import weights
from ...demo.text import WIDTH, TextModel, token_rows
from ...techniques.masked_tokens.networks.uvit import UViT, UViTConfig
from ...techniques.masked_tokens.networks.vq import load_vq
from ..weights import save_network
from . import vq
from .canvas import SIZE, Canvases
from .device import autocast
from .loop import train

CODES = vq.CONFIG["num_vq_embeddings"]
CONFIG = {
    "hidden_size": 112,
    "encoder_hidden_size": WIDTH,
    "cond_embed_dim": WIDTH,
    "micro_cond_encode_dim": 16,
    "vocab_size": CODES + 1,
    "codebook_size": CODES,
    "in_channels": 64,
    "block_out_channels": 80,
    "num_res_blocks": 3,  # fewer, and the middle of the 8x8 grid would not know its place: only borders tell
    "block_num_heads": 2,
    "downsample": True,
    "upsample": True,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 176,
    "sample_size": 16,
}
FOLDER = "masked_token/transformer"
MICRO = (SIZE, SIZE, 0, 0, 6)  # width, height, the crop's top and left, aesthetic score
DROP = 0.1  # share of captions replaced by the empty one, for guidance
# what a residual sum or a modulation adds starts at zero
ZEROED = (
    "to_out.0.weight",
    "ff.net.2.weight",
    "channelwise_linear_2.weight",
    "cond_embeds_mapper.weight",
    ".linear.weight",
)


@dataclass(frozen=True)
class Plan:
    name: str = "masked_tokens"
    steps: int = 6000
    batch: int = 64
    lr: float = 2e-3
    muon: float = 3.0  # see loop.Optimizer
    warmup: int = 200
    decay: float = 0.999
    seed: int = 31
    one: float = 0.65  # share of canvases with a single sign


class Operations:
    """torch.nn with linear layers in bfloat16. Autocast would take attention along, whose backward pass on the CPU is
    several times slower in bfloat16."""

    Conv2d, ConvTranspose2d, Embedding = nn.Conv2d, nn.ConvTranspose2d, nn.Embedding
    RMSNorm, LayerNorm = nn.RMSNorm, nn.LayerNorm

    class Linear(nn.Linear):
        def forward(self, x):
            return F.linear(x.bfloat16(), self.weight.bfloat16()).float()


def initialise(uvit, generator):
    for name, p in uvit.named_parameters():
        if name.endswith(ZEROED):
            p.data.zero_()
        elif name.endswith("conv2.weight"):
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.02)
        elif "embeddings" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator))
        elif p.ndim > 1 and "channelwise_norm" not in name:
            fan = p.shape[0] if "upsample" in name else p[0].numel()
            p.data.copy_(torch.randn(p.shape, generator=generator) * fan**-0.5)


class Student(nn.Module):
    """The loss of a batch."""

    def __init__(self, plan):
        super().__init__()
        self.uvit = UViT(UViTConfig(**CONFIG), Operations)
        initialise(self.uvit, torch.Generator().manual_seed(plan.seed))
        self.text = TextModel().requires_grad_(False)
        self.text.load_state_dict(weights.load("text"))

    def forward(self, ids, masked, captions):
        """ids [B, 16, 16], masked [B, 16, 16] bool, captions [B, 20] word numbers -> mean cross entropy in nats"""
        with torch.no_grad():
            text, _, pooled, _ = self.text(captions)
        micro = torch.tensor(MICRO, device=ids.device).expand(len(ids), -1)
        logits = self.uvit(ids.masked_fill(masked, CODES), self.uvit.condition(text, pooled, micro))
        return F.cross_entropy(logits.movedim(1, -1)[masked], ids[masked])


class Data:
    """Batch k holds canvases k * batch ... of the plan's data set as token ids; this worker's part of it.

    The numbers are the same for any number of workers.
    """

    def __init__(self, plan, worker=0, workers=1):
        self.plan = plan
        self.canvases = Canvases("noto", seed=plan.seed, one=plan.one)
        part = plan.batch // workers
        self.part = slice(worker * part, (worker + 1) * part)
        self.vq = load_vq(*weights.load_network(vq.FOLDER))

    @torch.no_grad()
    def batch(self, k):
        """ids, masked, captions"""
        start, stop, count = self.part.start, self.part.stop, self.plan.batch
        pixels, captions, _ = self.canvases.batch(k * count + start, stop - start)
        with autocast():  # half the time; a token between two codes may go to either
            z = self.vq.quant_conv(self.vq.encoder(torch.from_numpy(pixels).movedim(3, 1).float() / 255))
        ids = self.vq.quantize.nearest(z.float())
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + k)
        drop = (torch.rand(count, generator=generator) < DROP)[self.part]
        captions = ["" if d else c for d, c in zip(drop.tolist(), captions)]
        masked = random_masks(count, ids[0].numel(), generator)[self.part].view_as(ids)
        return ids, masked, token_rows(captions)


def random_masks(count, length, generator):
    """bool [count, length]: a share cos(pi r / 2) of the tokens, r uniform in 0..1, at least one."""
    share = torch.cos(torch.rand(count, 1, generator=generator) * math.pi / 2)
    rank = torch.rand(count, length, generator=generator).argsort(1).argsort(1)
    return rank < (share * length).round().clamp(min=1)


def job(plan, worker, workers):
    def export(average, step, spent, log):
        state = {k.removeprefix("uvit."): v for k, v in average.items() if k.startswith("uvit.")}
        facts = {"steps": step, "canvases": step * plan.batch, "seconds": round(spent), "style": "noto"}
        facts |= {"loss": log[-1][1] if log else "", "seed": plan.seed, "license": "Apache-2.0"}
        save_network(FOLDER, state, {"_class_name": "UVit2DModel", **CONFIG}, **facts)

    return Student(plan), Data(plan, worker, workers), export


def main(minutes=None, workers=1):
    train(Plan(), job, minutes, workers, save_minutes=4.0)
