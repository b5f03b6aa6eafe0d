"""The small U-ViT: masked tokens of the small VQ-GAN and a caption in, the tokens out, in aMUSEd's layout.

The objective is aMUSEd's (arXiv 2401.01808, section 3.2): r uniform in 0..1, a share cos(pi r / 2) of the tokens masked,
cross entropy on those. The text encoder is the demo's, frozen.

The committed weights are 5,044 of the 6,000 steps (265,568 canvases): 80 minutes by --minutes on two busy cores, in three
runs. The first 1,789 steps had 32 canvases each, AdamW alone and 192 units in the feed-forward layers, of which the 16
weakest of each layer were then cut; up to step 3,300 attention to the text inside the two convolutional blocks was off.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ...demo import weights
from ...demo.text import WIDTH, TextModel, token_rows
from ...techniques.masked_tokens.networks.uvit import UViT, UViTConfig
from ...techniques.masked_tokens.networks.vq import load_vq
from ..recipes.masked_tokens import initialise, random_masks
from ..weights import save_network
from . import loop, vq
from .canvas import SIZE, Canvases
from .device import autocast

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


class Data(loop.Batches):
    """Batches of the plan's data set as token ids."""

    def __init__(self, plan, worker=0, workers=1):
        super().__init__(plan, Canvases("noto", seed=plan.seed, one=plan.one), worker, workers)
        self.vq = load_vq(*weights.load_network(vq.FOLDER))

    @torch.no_grad()
    def batch(self, k):
        """ids, masked, captions"""
        images, captions, _ = self.drawn(k)
        with autocast():  # half the time; a token between two codes may go to either
            z = self.vq.quant_conv(self.vq.encoder(images.float() / 255))
        ids = self.vq.quantize.nearest(z.float())
        generator = self.generator(k)
        captions = self.with_empty(captions, DROP, generator)
        masked = random_masks(self.plan.batch, ids[0].numel(), generator)[self.part].view_as(ids)
        return ids, masked, token_rows(captions)


def job(plan, worker, workers):
    def export(average, step, spent, log):
        facts = loop.facts(plan, step, spent, log, canvases=step * plan.batch, style="noto")
        save_network(FOLDER, loop.part_of(average, "uvit."), {"_class_name": "UVit2DModel", **CONFIG}, **facts)

    return Student(plan), Data(plan, worker, workers), export


def main(minutes=None, workers=1):
    loop.train(Plan(), job, minutes, workers, save_minutes=4.0)
