"""Training of the autoencoder with an L1 and a gradient loss; a patch discriminator is added in the second half.

The data are crops of canvases of both styles. Noise with a standard deviation of up to 0.3 is added to half of the
latents, so that decoded images stay clean where a denoiser is inexact. Plain areas have a larger weight in the gradient
loss, because an 8-pixel grid of artefacts would be visible there.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ...demo.autoencoder import Autoencoder
from ...demo.concepts import STYLES
from . import loop, sheets, snapshots
from .device import autocast, device
from .discriminator import Adversary
from .pca import start_as_pca
from .scenes import CELL, SIZE, Scenes

NAME = "autoencoder"
CROP = 64
NOISE = 0.3
UNSEEN = 10**6  # index of the first canvas for evaluation


@dataclass(frozen=True, kw_only=True)
class Plan(loop.Plan):
    name: str = NAME
    steps: int = 18000
    batch: int = 16
    lr: float = 1e-3
    warmup: int = 100
    betas: tuple = (0.9, 0.95)
    weight_decay: float = 1e-3
    hours: float = 0.7
    evaluated: int = 256
    canvases: int = 4000  # of each style
    gan_from: float = 0.5  # share of the steps after which the discriminator is added
    gan_weight: float = 0.05
    regularisation: float = 0.05  # weight of the loss on the latent's mean and variance

    def small(self, **changes):
        return super().small(**{"canvases": 24, **changes})


PLAN = Plan()


def to_tensor(pixels):
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in -1..1"""
    return torch.from_numpy(np.ascontiguousarray(pixels)).movedim(3, 1).float() / 127.5 - 1


class Task:
    def __init__(self, plan):
        self.plan = plan
        torch.manual_seed(plan.seed)
        self.pool = np.concatenate([Scenes(style, seed=1).batch(0, plan.canvases)[0] for style in STYLES])
        self.network = Autoencoder()
        stride = max(1, len(self.pool) // 600)
        self.kept = start_as_pca(self.network, to_tensor(self.pool[::stride]))
        self.adversary = Adversary()

    def snapshot(self):
        return snapshots.load(NAME)

    def extra(self):
        return self.adversary.state_dict()

    def load_extra(self, found):
        self.adversary.load_state_dict(found)

    def crops(self, step):
        """Crops [B, 3, 64, 64] in -1..1. Three of four start on the latent's grid, like the emoji; the others start at
        any pixel."""
        rng = np.random.default_rng([self.plan.seed, step])
        chosen, found = rng.integers(len(self.pool), size=self.plan.batch), []
        for k, index in enumerate(chosen):
            grid = CELL if k % 4 else 1
            y, x = rng.integers((SIZE - CROP) // grid + 1, size=2) * grid
            found.append(self.pool[index, y : y + CROP, x : x + CROP])
        return to_tensor(np.stack(found)).to(device())

    def loss(self, step):
        plan, x = self.plan, self.crops(step)
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
        with autocast():
            z = self.network.encode(x).float()
            strength = (2 * torch.rand(len(x), 1, 1, 1, generator=generator) - 1).clamp(min=0) * NOISE
            noise = strength * torch.randn(z.shape, generator=generator)
            y = self.network.decode(z + noise.to(z)).float()
        loss = reconstruction(y, x)
        loss = loss + plan.regularisation * (z.mean((0, 2, 3)).square().mean() + (z.var((0, 2, 3)) - 1).square().mean())
        if (since := step - plan.gan_from * plan.steps) >= 0:
            loss = loss + plan.gan_weight * min(1.0, since / 1500) * self.adversary.loss(y, x)
        return loss

    def sheet(self, network):
        x = torch.cat([to_tensor(Scenes(style, seed=99).batch(UNSEEN, 8)[0]) for style in STYLES]).to(device())
        z = network.encode(x)
        noisy = z + NOISE * torch.randn(z.shape, generator=torch.Generator().manual_seed(5)).to(z)
        rows = zip(x.split(8), network.decode(z).split(8), network.decode(noisy).split(8))
        return sheets.to_image(torch.cat([part for row in rows for part in row]), 8)

    def export(self, network, facts):
        """Save the weights, with the mean and standard deviation of the latents over canvases of both styles."""
        x = to_tensor(self.pool[:: max(1, len(self.pool) // 512)]).to(device())
        z = torch.cat([network.encoder(part) for part in x.split(32)])
        state = dict(network.state_dict(), shift=z.mean((0, 2, 3)), scale=z.std((0, 2, 3)))
        model = Autoencoder().to(device()).eval()
        model.load_state_dict(state)
        found = errors(model, self.plan.evaluated)
        print(f"{NAME}: mean absolute error on unseen canvases, for pixels in -1..1: {found}", flush=True)
        snapshots.save(NAME, state, style="flat", pca_keeps=round(self.kept, 4), **found, **facts)


def reconstruction(y, x):
    """L1 loss of the pixels, and of the differences of neighbouring pixels. The differences count twice in plain
    areas."""
    loss = (y - x).abs().mean()
    for dim in (2, 3):
        dx = x.diff(dim=dim)
        loss = loss + ((y.diff(dim=dim) - dx).abs() * (1 + (dx.abs() < 0.02).float())).mean()
    return loss


@torch.no_grad()
def errors(model, count):
    """Mean absolute reconstruction error on unseen canvases, by style.

    The keys with _held_out are for canvases with the sizes and backgrounds that are excluded from training.
    """
    found = {}
    for style in STYLES:
        for kind, unseen in (("", False), ("_held_out", True)):
            x = to_tensor(Scenes(style, seed=99, unseen=unseen).batch(UNSEEN, count)[0]).to(device())
            y = torch.cat([model.decode(model.encode(part)).clamp(-1, 1) for part in x.split(32)])
            found[style + kind] = round((y - x).abs().mean().item(), 5)
    return found


def load():
    """The frozen autoencoder with the weights of its snapshot, for all later stages."""
    return snapshots.frozen(Autoencoder(), snapshots.load(NAME), "autoencoder", NAME)


@torch.no_grad()
def encode(model, pixels):
    """uint8 [B, S, S, 3] -> latents [B, 8, S/8, S/8] in fp16 on the CPU"""
    parts = [model.encode(to_tensor(pixels[k : k + 32]).to(device())).half().cpu() for k in range(0, len(pixels), 32)]
    return torch.cat(parts)


@torch.no_grad()
def pass_through(pixels, disturb):
    """Encode images uint8 [B, S, S, 3], change their latents with ``disturb`` and decode them, in parts of 32 images.

    ``disturb`` gets and returns latents [N, 8, S/8, S/8] on the CPU.
    """
    model, found = load(), []
    for k in range(0, len(pixels), 32):
        z = disturb(model.encode(to_tensor(pixels[k : k + 32]).to(device())).cpu())
        y = model.decode(z.to(device())).clamp(-1, 1)
        found.append(((y + 1) * 127.5).round().byte().movedim(1, 3).cpu().numpy())
    return np.concatenate(found)
