"""The small U-ViT: masked tokens of the VQ-GAN and a caption in, the tokens out, in aMUSEd's layout (techniques/masked_tokens/networks/uvit.py).

The objective is aMUSEd's (arXiv 2401.01808, section 3.2): r uniform in 0..1, a share cos(pi r / 2) of the tokens masked,
cross entropy on those. The text encoder is that of the demo checkpoints, frozen.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ...demo.emoji.concepts import PAD, START
from ...demo.emoji.text import WIDTH, TextModel, token_rows
from ...techniques.masked_tokens import decode as technique
from ...techniques.masked_tokens.networks.uvit import UViT, UViTConfig
from . import banks, denoiser, loop, sheets, snapshots, state, vq
from .device import device, has_bfloat16
from .scenes import SIZE, Scenes

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
    "num_res_blocks": 3,  # fewer, and the middle of the grid would not know its place: only borders tell
    "block_num_heads": 2,
    "downsample": True,
    "upsample": True,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 144,
    "sample_size": 16,
}
MICRO = (SIZE, SIZE, 0, 0, 6)  # width, height, the crop's top and left, aesthetic score
SHEET_STEPS, SHEET_CFG = 12, 3.0
# what a residual sum or a modulation adds starts at zero
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
    steps: int = 20000
    batch: int = 48
    lr: float = 2e-3
    muon: float = 3.0  # found better than AdamW alone on the first demo world
    warmup: int = 200
    seed: int = 31
    hours: float = 1.1
    canvases: int = 16000
    alone: float = 0.6

    def small(self, **changes):
        return super().small(**{"canvases": 24, **changes})


PLAN = Plan()
PLANS, HOURS = (PLAN,), PLAN.hours


class Operations:
    """torch.nn, where the processor multiplies bfloat16 with linear layers in it. Autocast would take attention along,
    the backward pass of which is several times slower in bfloat16 on a CPU."""

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


def make_bank(plan, model, report=print):
    """{'ids': int16 [N, 16, 16], 'tokens': int64 [N, 20]} of canvases, encoded once by the VQ-GAN ``model``."""
    key = f"{banks.digest(model)} {plan.canvases} {plan.alone} {plan.seed}"
    found = state.load("bank-masked-tokens", report)
    if found is not None and found["key"] == key:
        return found
    scenes, ids, captions = Scenes(vq.STYLE, seed=plan.seed, alone=plan.alone), [], []
    for start in range(0, plan.canvases, 256):
        pixels, texts, _ = scenes.batch(start, min(256, plan.canvases - start))
        ids.append(vq.encode(model, pixels))
        captions += texts
        if start % 10240 == 0:
            report(f"bank masked-tokens: {start} of {plan.canvases} canvases encoded")
    found = {"key": key, "ids": torch.cat(ids), "tokens": token_rows(captions)}
    state.save("bank-masked-tokens", found, keep_previous=False)
    return found


def random_masks(count, length, generator):
    """bool [count, length]: a share cos(pi r / 2) of the tokens, r uniform in 0..1, at least one."""
    share = torch.cos(torch.rand(count, 1, generator=generator) * math.pi / 2)
    rank = torch.rand(count, length, generator=generator).argsort(1).argsort(1)
    return rank < (share * length).round().clamp(min=1)


class Task:
    def __init__(self, plan, report=print):
        self.plan, self.vq = plan, vq.load()
        self.text = TextModel()
        self.text.load_state_dict(denoiser.load_text())
        self.text.to(device()).eval().requires_grad_(False)
        self.bank = make_bank(plan, self.vq, report)
        self.network = UViT(UViTConfig(**CONFIG), Operations)
        initialise(self.network, torch.Generator().manual_seed(plan.seed))

    def snapshot(self):
        return snapshots.load_network(SNAPSHOT)

    def batch(self, step):
        """ids [B, 16, 16], masked [B, 16, 16], tokens [B, 20]"""
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
        """Pictures of the denoisers' prompts."""
        prompts, side = list(denoiser.PROMPTS), CONFIG["sample_size"]
        wanted = self.condition(network, token_rows(prompts))
        empty = self.condition(network, token_rows([""] * len(prompts)))
        settings = technique.MaskedTokenSettings(codebook=CODES, mask_id=CODES, steps=SHEET_STEPS)
        ids = technique.decode(
            torch.full((len(prompts), side, side), CODES, device=device()),
            technique.guided(
                lambda ids: network(ids, wanted),
                lambda ids: (network(ids, wanted), network(ids, empty)),
                technique.guidance_scales(SHEET_CFG, SHEET_STEPS),
            ),
            settings,
            technique.draw(0, len(prompts), side, side, SHEET_STEPS),
        )
        return sheets.to_image(2 * self.vq.decode(ids) - 1, len(prompts))

    def export(self, network, facts):
        config = {"_class_name": "UVit2DModel", **CONFIG}
        snapshots.save_network(SNAPSHOT, network.state_dict(), config, style=vq.STYLE, **facts)


def done():
    return int(snapshots.network_facts(SNAPSHOT).get("step", -1)) >= PLAN.steps


def run(smoke=False, report=print):
    plan = PLAN.small() if smoke else PLAN
    loop.train(plan, Task(plan, report), report=report)
