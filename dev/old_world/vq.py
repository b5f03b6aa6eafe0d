"""The small VQ-GAN: pictures as 16x16 token ids of 512 codes, in aMUSEd's layout (techniques/masked_tokens/networks/vq.py).

Trained without a discriminator: absolute, squared and gradient error, a commitment, and a codebook that follows the
means of its tokens (VQ-VAE, arXiv 1711.00937, appendix A.1).

The committed weights are 1,545 of the 3,000 steps (49,440 canvases): 22 minutes by --minutes on two busy cores, in two
resumed runs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..recipes import vq as recipe
from ..weights import save_network
from . import loop
from .canvas import Canvases
from .device import autocast

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "vq_embed_dim": 8,
    "num_vq_embeddings": 512,
    "block_out_channels": [16, 32, 40],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
FOLDER = "masked_token/vqvae"
CODES_FROM = 200  # the first step with a codebook; before, the latents are not yet worth to be clustered
CODE_DECAY = 0.98  # of a code's moving average, per step
DEAD = 0.25  # tokens per batch below which a code is taken anew from the encoder's outputs
RESTARTS_UNTIL = 0.7  # of the training


@dataclass(frozen=True)
class Plan:
    name: str = "vq"
    steps: int = 3000
    batch: int = 32
    lr: float = 2e-3
    warmup: int = 100
    decay: float = 0.995
    seed: int = 21


class Student(nn.Module):
    """The loss of a batch, and the codebook's own learning after it."""

    def __init__(self, workers=1):
        super().__init__()
        self.vq, self.workers = recipe.make_vq(CONFIG), workers
        self.vq.quantize.requires_grad_(False)
        codes = self.vq.quantize.embedding.weight
        self.register_buffer("counts", torch.ones(len(codes)))  # tokens per batch, a moving average
        self.register_buffer("sums", codes.detach().clone())
        self.register_buffer("steps", torch.zeros(()))
        for name, p in self.vq.named_parameters():
            if name.endswith("conv2.weight"):  # residual branches start small
                p.data.mul_(0.1)

    def forward(self, images):
        """images [B, 3, 64, 64], 0..1"""
        with autocast():
            z = self.vq.quant_conv(self.vq.encoder(images)).float()
        if self.steps >= CODES_FROM:
            self.ids = self.vq.quantize.nearest(z.detach())
            codes = self.vq.quantize.lookup(self.ids)
        else:
            codes = z.detach()
        self.z = z.detach().movedim(1, -1).flatten(0, 2)
        with autocast():
            y = self.vq.decoder(self.vq.post_quant_conv(z + (codes - z).detach())).float()
        return reconstruction(y, images) + 0.25 * (z - codes).square().mean()

    @torch.no_grad()
    def after_step(self, step, progress):
        self.steps += 1
        if step + 1 < CODES_FROM:
            return
        codes = self.vq.quantize.embedding.weight
        if step + 1 == CODES_FROM:
            codes.copy_(self.agree(recipe.kmeans(self.z, len(codes))))
            self.counts.fill_(1.0)
            self.sums.copy_(codes)
            return
        ids = self.ids.flatten()
        here = torch.cat([F.one_hot(ids, len(codes)).float().sum(0)[:, None], torch.zeros_like(codes)], 1)
        here[:, 1:].index_add_(0, ids, self.z)
        if self.workers > 1:
            torch.distributed.all_reduce(here)
        self.counts.lerp_(here[:, 0], 1 - CODE_DECAY)
        self.sums.lerp_(here[:, 1:], 1 - CODE_DECAY)
        dead = self.counts < DEAD
        if step % 10 == 0 and progress < RESTARTS_UNTIL and dead.any():
            fresh = self.agree(self.badly_coded(int(dead.sum())))
            self.counts[dead] = 1.0
            self.sums[dead] = fresh
        codes.copy_(self.sums / self.counts.clamp(min=1e-4)[:, None])

    def badly_coded(self, count):
        """Outputs of the encoder [count, C], those far from their code more often."""
        error = (self.z - self.vq.quantize.embedding(self.ids.flatten())).square().sum(1)
        return self.z[torch.multinomial(error + 1e-8, count)]

    def agree(self, x):
        """The first worker's tensor."""
        if self.workers > 1:
            x = x.contiguous()
            torch.distributed.broadcast(x, 0)
        return x


def reconstruction(y, x):
    """Errors of pictures 0..1, each about 1 for a picture that shows nothing."""
    d = y - x
    edges = (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
    return d.abs().mean() / 0.2 + d.square().mean() / 0.08 + edges / 0.2


class Data(loop.Batches):
    """Batches of the Noto pictures, all signs equally often."""

    def __init__(self, plan, worker=0, workers=1):
        super().__init__(plan, Canvases("noto", seed=plan.seed, balanced=True, one=0.6), worker, workers)

    def batch(self, k):
        return (self.drawn(k)[0].float() / 255,)


def quality(vq, unseen=True, count=256):
    """PSNR in dB and codes in use on new canvases, of the held-out split (whose colours no training has) or as trained."""
    pixels, _, _ = Canvases("noto", seed=99, unseen=unseen).batch(0, count)
    found = recipe.quality(vq, torch.from_numpy(pixels).movedim(3, 1).float() / 255, part_size=64)
    return {name: found[name] for name in ("psnr", "codes", "perplexity")}


def job(plan, worker, workers):
    def export(average, step, spent, log):
        state = loop.part_of(average, "vq.")
        vq = recipe.make_vq(CONFIG).eval()
        vq.load_state_dict(state)
        facts = loop.facts(plan, step, spent, log, canvases=step * plan.batch, **quality(vq))
        print(f"\n{plan.name}: {facts}", flush=True)
        save_network(FOLDER, state, {"_class_name": "VQModel", **CONFIG}, **facts)

    return Student(workers), Data(plan, worker, workers), export


def main(minutes=None, workers=1):
    loop.train(Plan(), job, minutes, workers, save_minutes=2.0)
