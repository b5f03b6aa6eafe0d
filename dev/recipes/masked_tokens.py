"""Training of the small U-ViT, which predicts masked tokens of the VQ-GAN from a caption.

The network has aMUSEd's layout, see techniques/masked_tokens/networks/uvit.py. The objective is also aMUSEd's (arXiv
2401.01808, section 3.2): a share cos(pi r / 2) of the tokens is masked, with r uniform in 0..1, and the loss is the
cross entropy on the masked tokens. The text encoder is that of the demo checkpoints, and frozen.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ...demo.concepts import PAD, START
from ...demo.text import WIDTH, TextModel, token_rows
from ...techniques.masked_tokens import decode as technique
from ...techniques.masked_tokens.networks.uvit import UViT, UViTConfig
from . import banks, denoiser, loop, sheets, snapshots, vq
from .device import device, has_bfloat16
from .scenes import SIZE

NAME = "masked_tokens"
SNAPSHOT = "masked_token/transformer"
CODES = vq.CONFIG["num_vq_embeddings"]
CONFIG = {
    "hidden_size": 96,
    "encoder_hidden_size": WIDTH,
    "cond_embed_dim": WIDTH,
    "micro_cond_encode_dim": 16,
    "vocab_size": CODES + 1,
    "codebook_size": CODES,
    "in_channels": 64,
    "block_out_channels": 64,
    "num_res_blocks": 3,  # with fewer, the receptive field of a token in the middle would not reach the border
    "block_num_heads": 2,
    "downsample": True,
    "upsample": True,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 144,
    "sample_size": 16,
}
MICRO = (SIZE, SIZE, 0, 0, 6)  # aMUSEd's micro-conditioning: width, height, top and left of the crop, aesthetic score
SHEET_STEPS, SHEET_CFG = 12, 3.0
# weights that are initialised to zero: the last layers of residual branches, and modulations
ZEROED = (
    "to_out.0.weight",
    "ff.net.2.weight",
    "channelwise_linear_2.weight",
    "cond_embeds_mapper.weight",
    ".linear.weight",
)


@dataclass(frozen=True, kw_only=True)
class Plan(loop.Plan):
    name: str = NAME
    steps: int = 2300
    batch: int = 192
    lr: float = 2e-3
    muon: float = 3.0  # in trials, Muon was better than AdamW for all weights
    warmup: int = 200
    seed: int = 31
    hours: float = 1.0
    canvases: int = 20000
    alone: float = 0.6

    def small(self, **changes):
        return super().small(**{"canvases": 24, **changes})


PLAN = Plan()


class Operations:
    """torch.nn, with linear layers that compute in bfloat16 if the processor supports it.

    Autocast is not used, because it would also cast attention. The backward pass of attention is several times slower
    in bfloat16 on a CPU.
    """

    Conv2d, ConvTranspose2d, Embedding = nn.Conv2d, nn.ConvTranspose2d, nn.Embedding
    RMSNorm, LayerNorm = nn.RMSNorm, nn.LayerNorm

    class Linear(nn.Linear):
        def forward(self, x):
            if not has_bfloat16():
                return super().forward(x)
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


def random_masks(count, length, generator):
    """Random masks, bool [count, length]. Each masks a share cos(pi r / 2) of the tokens, with r uniform in 0..1, and
    at least one token."""
    share = torch.cos(torch.rand(count, 1, generator=generator) * math.pi / 2)
    rank = torch.rand(count, length, generator=generator).argsort(1).argsort(1)
    return rank < (share * length).round().clamp(min=1)


def generate(uvit, positive, empty, settings, cfg, count, seed=0):
    """Generate token ids [count, h, w] with the conditioning ``positive``, guided away from the conditioning
    ``empty``."""
    shape = count, uvit.config.sample_size, uvit.config.sample_size
    return technique.decode(
        torch.full(shape, settings.mask_id, device=device()),
        technique.guided(
            lambda ids: uvit(ids, positive),
            lambda ids: (uvit(ids, positive), uvit(ids, empty)),
            technique.guidance_scales(cfg, settings.steps),
        ),
        settings,
        technique.draw_uniforms(seed, *shape, settings.steps),
    )


class Task:
    def __init__(self, plan, report=print):
        self.plan, self.vq = plan, vq.load()
        self.text = TextModel()
        self.text.load_state_dict(denoiser.load_text())
        self.text.to(device()).eval().requires_grad_(False)
        scenes = dict(style=vq.STYLE, seed=plan.seed, alone=plan.alone)
        self.bank = banks.bank("masked-tokens", self.vq, plan.canvases, report, kind="ids", encode=vq.encode, **scenes)
        self.network = UViT(UViTConfig(**CONFIG), Operations)
        initialise(self.network, torch.Generator().manual_seed(plan.seed))

    def snapshot(self):
        return snapshots.load_network(SNAPSHOT)

    def batch(self, step):
        """A batch: token ids [B, 16, 16], masks [B, 16, 16], and caption tokens [B, 20]."""
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + step)
        rows = torch.randint(len(self.bank["ids"]), (self.plan.batch,), generator=generator)
        ids, tokens = self.bank["ids"][rows].long(), self.bank["tokens"][rows].clone()
        empty = torch.tensor([START, *[PAD] * (tokens.shape[1] - 1)])
        tokens[torch.rand(len(rows), generator=generator) < denoiser.DROP] = empty
        return ids, random_masks(len(ids), ids[0].numel(), generator).view_as(ids), tokens

    def condition(self, network, tokens):
        with torch.no_grad():
            states, _, summary, _ = self.text(tokens.to(device()))
        micro = torch.tensor(MICRO, device=states.device).expand(len(states), -1)
        return network.condition(states, summary, micro)

    def loss(self, step):
        ids, masked, tokens = (part.to(device()) for part in self.batch(step))
        logits = self.network(ids.masked_fill(masked, CODES), self.condition(self.network, tokens))
        return F.cross_entropy(logits.movedim(1, -1)[masked], ids[masked])

    def sheet(self, network):
        """A row of images for the prompts of the denoisers' sample sheets."""
        prompts = list(denoiser.PROMPTS)
        positive = self.condition(network, token_rows(prompts))
        empty = self.condition(network, token_rows([""] * len(prompts)))
        settings = technique.MaskedTokenSettings(codebook=CODES, mask_id=CODES, steps=SHEET_STEPS)
        ids = generate(network, positive, empty, settings, SHEET_CFG, len(prompts))
        return sheets.to_image(2 * self.vq.decode(ids) - 1, len(prompts))

    def export(self, network, facts):
        config = {"_class_name": "UVit2DModel", **CONFIG}
        snapshots.save_network(SNAPSHOT, network.state_dict(), config, style=vq.STYLE, **facts)
