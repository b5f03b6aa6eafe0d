"""The VQ-GAN: canvases as 16 x 16 token ids of 512 codes, in aMUSEd's layout (techniques/masked_tokens/networks/vq.py).

Absolute, squared and gradient error, a commitment, a codebook that follows the means of its tokens (VQ-VAE,
arXiv 1711.00937, appendix A.1), and late a patch discriminator.
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
UNSEEN = 10**6


@dataclass(frozen=True, kw_only=True)
class Plan(loop.Plan):
    """``codes_from``: the step at which the codebook is placed by k-means; before, there is none. ``dead``: tokens per batch
    below which a code is replaced by an output of the encoder."""

    name: str = NAME
    steps: int = 10000
    batch: int = 16
    lr: float = 2e-3
    warmup: int = 100
    ema_decay: float = 0.995
    seed: int = 21
    hours: float = 0.9
    evaluated: int = 256
    canvases: int = 8000
    codes_from: int = 400
    code_decay: float = 0.98
    dead: float = 0.25
    restarts_until: float = 0.6  # share of the steps
    gan_from: float = 0.5
    gan_weight: float = 0.05

    def small(self, **changes):
        return super().small(**{"canvases": 24, "steps": 5, "codes_from": 2, **changes})


PLAN = Plan()
PLANS, HOURS = (PLAN,), PLAN.hours


def make_vq():
    return VQGAN(VQConfig(**{**CONFIG, "block_out_channels": tuple(CONFIG["block_out_channels"])}))


class Codebook:
    """``codes`` [K, D] that follow the means of their tokens; ``counts`` [K]: tokens per batch, a moving average."""

    def __init__(self, codes, decay, dead):
        self.codes, self.decay, self.dead = codes, decay, dead
        self.counts = torch.ones(len(codes), device=codes.device)

    @torch.no_grad()
    def place(self, x, generator):
        """Codes at the means of k-means of x [N, D]."""
        self.codes.copy_(far_apart(x, len(self.codes), generator))
        self.counts.fill_(1.0)

    @torch.no_grad()
    def follow(self, x, ids, generator=None):
        """Move towards the vectors x [N, D] that have the codes ``ids`` [N]; with a ``generator`` dead codes are replaced by
        vectors that are far from their codes."""
        counts = torch.bincount(ids, minlength=len(self.codes)).float()
        sums = torch.zeros_like(self.codes).index_add_(0, ids, x)
        averages = (self.codes * self.counts[:, None]).lerp_(sums, 1 - self.decay)
        self.counts.lerp_(counts, 1 - self.decay)
        dead = self.counts < self.dead
        if generator is not None and dead.any():
            error = (x - self.codes[ids]).square().sum(1)
            fresh = torch.multinomial(error.cpu() + 1e-8, int(dead.sum()), replacement=True, generator=generator)
            self.counts[dead], averages[dead] = 1.0, x[fresh.to(x.device)]
        self.counts.clamp_(min=1e-4)  # below, a code without tokens would lose its place by rounding
        self.codes.copy_(averages / self.counts[:, None])


def far_apart(x, count, generator, rounds=10):
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
    """Errors of pictures in 0..1, each about 1 for a picture that shows nothing."""
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
            if name.endswith("conv2.weight"):  # residual branches start small
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
        # contiguous: on a CPU the backward pass of group norm is several times slower with channels last
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
            self.codebook.place(self.z, self.generator(step))
        elif step >= self.plan.codes_from:
            restart = step % 10 == 0 and step < self.plan.restarts_until * self.plan.steps
            self.codebook.follow(self.z, self.ids.flatten(), self.generator(step) if restart else None)

    def sheet(self, network):
        """Unseen canvases above what their tokens give."""
        x = to_tensor(Scenes(STYLE, seed=99).batch(UNSEEN, 12)[0])
        y = 2 * network.decode(network.encode((x / 2 + 0.5).to(device()))) - 1
        return sheets.to_image(torch.cat([x, y.cpu()]), 12)

    def export(self, network, facts):
        found = quality(network, self.plan.evaluated)
        print(f"{NAME}: on unseen canvases {found}", flush=True)
        config = {"_class_name": "VQModel", **CONFIG}
        snapshots.save_network(SNAPSHOT, network.state_dict(), config, style=STYLE, **found, **facts)


@torch.no_grad()
def quality(vq, count):
    """PSNR in dB, mean absolute error (of 0..1), codes in use and their perplexity, on unseen canvases."""
    x = (to_tensor(Scenes(STYLE, seed=99).batch(UNSEEN, count)[0]) / 2 + 0.5).to(device())
    ids = torch.cat([vq.encode(part) for part in x.split(32)])
    y = torch.cat([vq.decode(part) for part in ids.split(32)]).clamp(0, 1)
    share = torch.bincount(ids.flatten(), minlength=CONFIG["num_vq_embeddings"]).float() / ids.numel()
    return {
        "psnr": round((-10 * (y - x).square().mean((1, 2, 3)).log10()).mean().item(), 2),
        "error": round((y - x).abs().mean().item(), 5),
        "codes": int((share > 0).sum()),
        "perplexity": round((-(share * share.clamp(min=1e-12).log()).sum()).exp().item(), 1),
    }


def load():
    """The frozen VQ-GAN of the snapshot."""
    return snapshots.frozen(make_vq(), snapshots.load_network(SNAPSHOT), "VQ-GAN", NAME)


@torch.no_grad()
def encode(vq, pixels):
    """uint8 [B, 128, 128, 3] -> ids int16 [B, 16, 16]"""
    x = to_tensor(np.ascontiguousarray(pixels)) / 2 + 0.5
    return torch.cat([vq.encode(part.to(device())).short().cpu() for part in x.split(32)])


def done():
    return int(snapshots.network_facts(SNAPSHOT).get("step", -1)) >= PLAN.steps


def run(smoke=False, report=print):
    plan = PLAN.small() if smoke else PLAN
    loop.train(plan, Task(plan), report=report)
