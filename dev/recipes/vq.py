"""Training of the VQ-GAN, which encodes a canvas as 16 x 16 tokens from a codebook of 512 codes.

The network has aMUSEd's layout (techniques/masked_tokens/networks/vq.py). The loss has absolute, squared and gradient
errors and a commitment term; a patch discriminator is added in the second half. Exponential moving averages update the
codebook (VQ-VAE, arXiv 1711.00937, appendix A.1).
"""

from dataclasses import dataclass

import numpy as np
import torch

from ...techniques.masked_tokens.networks.vq import VQGAN, VQConfig
from . import loop, sheets, snapshots
from .autoencoder import to_tensor
from .device import autocast, device
from .discriminator import Adversary
from .scenes import Scenes

NAME = "vq"
SNAPSHOT = "masked_token/vqvae"
STYLE = "glossy"
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "vq_embed_dim": 8,
    "num_vq_embeddings": 512,
    "block_out_channels": [16, 24, 32, 48],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
UNSEEN = 10**6  # index of the first canvas for evaluation


@dataclass(frozen=True, kw_only=True)
class Plan(loop.Plan):
    """Settings of the VQ-GAN's training.

    ``codes_from``: the step at which k-means initialises the codebook; earlier steps quantise nothing. ``dead``: a code
    with fewer tokens per batch than this is replaced by an output of the encoder.
    """

    name: str = NAME
    steps: int = 3800
    batch: int = 32
    lr: float = 2e-3
    warmup: int = 100
    ema_decay: float = 0.995
    seed: int = 21
    hours: float = 0.7
    evaluated: int = 256
    canvases: int = 24000
    codes_from: int = 400
    code_decay: float = 0.98
    dead: float = 0.25
    restarts_until: float = 0.6  # share of the steps after which dead codes are no longer replaced
    gan_from: float = 0.5
    gan_weight: float = 0.05

    def small(self, **changes):
        return super().small(**{"canvases": 24, "steps": 5, "codes_from": 2, **changes})


PLAN = Plan()


def make_vq(config=CONFIG):
    return VQGAN(VQConfig(**{**config, "block_out_channels": tuple(config["block_out_channels"])}))


class Codebook:
    """The codebook. ``codes`` [K, D]: exponential moving averages of each code's vectors. ``counts`` [K]: EMA of its
    tokens per batch."""

    def __init__(self, codes, decay, dead):
        self.codes, self.decay, self.dead = codes, decay, dead
        self.counts = torch.ones(len(codes), device=codes.device)

    @torch.no_grad()
    def initialise(self, x, generator):
        """Initialise the codes by k-means of x [N, D]."""
        self.codes.copy_(kmeans(x, len(self.codes), generator))
        self.counts.fill_(1.0)

    @torch.no_grad()
    def update(self, x, ids, generator=None):
        """Update the codes with the vectors x [N, D], to which the codes ``ids`` [N] are assigned.

        With a ``generator``, also replace dead codes by vectors of x that are far from their codes.
        """
        counts = torch.bincount(ids, minlength=len(self.codes)).float()
        sums = torch.zeros_like(self.codes).index_add_(0, ids, x)
        averages = (self.codes * self.counts[:, None]).lerp_(sums, 1 - self.decay)
        self.counts.lerp_(counts, 1 - self.decay)
        dead = self.counts < self.dead
        if generator is not None and dead.any():
            error = (x - self.codes[ids]).square().sum(1)
            fresh = torch.multinomial(error.cpu() + 1e-8, int(dead.sum()), replacement=True, generator=generator)
            self.counts[dead], averages[dead] = 1.0, x[fresh.to(x.device)]
        self.counts.clamp_(min=1e-4)  # with smaller counts, rounding errors would move a code without tokens
        self.codes.copy_(averages / self.counts[:, None])


def kmeans(x, count, generator=None, rounds=10):
    """k-means of x [N, D] from a k-means++ start (Arthur and Vassilvitskii 2007): [count, D]."""
    chosen, distance = [x[0]], torch.full((len(x),), torch.inf, device=x.device)
    for _ in range(count - 1):
        distance = torch.minimum(distance, (x - chosen[-1]).square().sum(1))
        chosen.append(x[int(torch.multinomial(distance.cpu() + 1e-10, 1, generator=generator))])
    codes = torch.stack(chosen)
    for _ in range(rounds):
        ids = torch.cdist(x, codes).argmin(1)
        sums = torch.zeros_like(codes).index_add_(0, ids, x)
        counts = torch.bincount(ids, minlength=count)[:, None]
        codes = torch.where(counts > 0, sums / counts.clamp(min=1), codes)
    return codes


def reconstruction(y, x):
    """Reconstruction error of images y against x, both in 0..1: a sum of terms, each about 1 if y is blank."""
    edges = sum((y - x).diff(dim=dim).abs().mean() for dim in (2, 3))
    return (y - x).abs().mean() / 0.2 + (y - x).square().mean() / 0.08 + edges / 0.2


class Task:
    def __init__(self, plan):
        self.plan = plan
        torch.manual_seed(plan.seed)
        self.pool = Scenes(STYLE, seed=plan.seed, balanced=True, alone=0.5).batch(0, plan.canvases)[0]
        self.network = make_vq().to(device())
        self.network.quantize.requires_grad_(False)
        for name, p in self.network.named_parameters():
            if name.endswith("conv2.weight"):  # at first, residual branches have small outputs
                p.data.mul_(0.1)
        self.codebook = Codebook(self.network.quantize.embedding.weight, plan.code_decay, plan.dead)
        self.adversary = Adversary()
        self.z = self.ids = None

    def snapshot(self):
        return snapshots.load_network(SNAPSHOT)

    def extra(self):
        return {"counts": self.codebook.counts, **self.adversary.state_dict()}

    def load_extra(self, found):
        self.codebook.counts.copy_(found["counts"])
        self.adversary.load_state_dict(found)

    def generator(self, step):
        return torch.Generator().manual_seed(self.plan.seed * 1_000_003 + step)

    def loss(self, step):
        rows = torch.randint(len(self.pool), (self.plan.batch,), generator=self.generator(step))
        # contiguous, because on a CPU the backward pass of group norm is several times slower with channels last
        x, vq = (to_tensor(self.pool[rows.numpy()]) / 2 + 0.5).contiguous().to(device()), self.network
        with autocast():
            z = vq.quant_conv(vq.encoder(x)).float()
        codes = z.detach()
        if step >= self.plan.codes_from:
            self.ids = vq.quantize.nearest(z.detach())
            codes = vq.quantize.lookup(self.ids)
        self.z = z.detach().movedim(1, -1).flatten(0, 2)
        with autocast():
            y = vq.decoder(vq.post_quant_conv(z + (codes - z).detach())).float()
        loss = reconstruction(y, x) + 0.25 * (z - codes).square().mean()
        if (since := step - self.plan.gan_from * self.plan.steps) >= 0:
            loss = loss + self.plan.gan_weight * min(1.0, since / 1000) * self.adversary.loss(2 * y - 1, 2 * x - 1)
        return loss

    def after_step(self, step):
        if step + 1 == self.plan.codes_from:
            self.codebook.initialise(self.z, self.generator(step))
        elif step >= self.plan.codes_from:
            restart = step % 10 == 0 and step < self.plan.restarts_until * self.plan.steps
            self.codebook.update(self.z, self.ids.flatten(), self.generator(step) if restart else None)

    def sheet(self, network):
        """An image with unseen canvases in the upper row and their reconstructions in the lower row."""
        x = to_tensor(Scenes(STYLE, seed=99).batch(UNSEEN, 12)[0])
        y = 2 * network.decode(network.encode((x / 2 + 0.5).to(device()))) - 1
        return sheets.to_image(torch.cat([x, y.cpu()]), 12)

    def export(self, network, facts):
        x = to_tensor(Scenes(STYLE, seed=99).batch(UNSEEN, self.plan.evaluated)[0]) / 2 + 0.5
        found = quality(network, x.to(device()))
        print(f"{NAME}: on unseen canvases {found}", flush=True)
        config = {"_class_name": "VQModel", **CONFIG}
        snapshots.save_network(SNAPSHOT, network.state_dict(), config, style=STYLE, **found, **facts)


@torch.no_grad()
def quality(vq, x, part_size=32):
    """Quality on images x [B, 3, H, W] in 0..1: PSNR in dB, mean absolute error, number of used codes and their
    perplexity."""
    ids = torch.cat([vq.encode(part) for part in x.split(part_size)])
    y = torch.cat([vq.decode(part) for part in ids.split(part_size)]).clamp(0, 1)
    share = torch.bincount(ids.flatten(), minlength=vq.quantize.embedding.num_embeddings).float() / ids.numel()
    return {
        "psnr": round((-10 * (y - x).square().mean((1, 2, 3)).log10()).mean().item(), 2),
        "error": round((y - x).abs().mean().item(), 5),
        "codes": int((share > 0).sum()),
        "perplexity": round((-(share * share.clamp(min=1e-12).log()).sum()).exp().item(), 1),
    }


def load():
    """The frozen VQ-GAN with the weights of its snapshot."""
    return snapshots.frozen(make_vq(), snapshots.load_network(SNAPSHOT), "VQ-GAN", NAME)


@torch.no_grad()
def encode(vq, pixels):
    """uint8 [B, 128, 128, 3] -> ids int16 [B, 16, 16]"""
    x = to_tensor(np.ascontiguousarray(pixels)) / 2 + 0.5
    return torch.cat([vq.encode(part.to(device())).short().cpu() for part in x.split(32)])
