"""The autoencoder: L1 and gradient loss, in the second half also a patch discriminator.

Trained on crops of canvases of both styles, half of the latents with noise of up to 0.3, so that decoded pictures stay
clean where a denoiser is not exact. Plain areas weigh more in the gradient loss: the eye finds a grid of 8 pixels there.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ...demo.emoji.autoencoder import Autoencoder
from ...demo.emoji.concepts import STYLES
from . import loop, sheets, snapshots
from .device import autocast, device
from .discriminator import Adversary
from .pca import start_as_pca
from .scenes import CELL, SIZE, Scenes

NAME = "autoencoder"
CROP = 64
NOISE = 0.3
UNSEEN = 10**6  # the canvas with which evaluation begins


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
    gan_from: float = 0.5  # share of the steps
    gan_weight: float = 0.05
    regularisation: float = 0.05  # of the latent's mean and variance

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
        """[B, 3, 64, 64] in -1..1: three of four on the grid of latent cells, as the emoji stand, the others anywhere."""
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
        """Folds the latent's mean and deviation over canvases of both styles into the model."""
        x = to_tensor(self.pool[:: max(1, len(self.pool) // 512)]).to(device())
        z = torch.cat([network.encoder(part) for part in x.split(32)])
        state = dict(network.state_dict(), shift=z.mean((0, 2, 3)), scale=z.std((0, 2, 3)))
        model = Autoencoder().to(device()).eval()
        model.load_state_dict(state)
        found = errors(model, self.plan.evaluated)
        print(f"{NAME}: mean absolute error of -1..1 on unseen canvases: {found}", flush=True)
        snapshots.save(NAME, state, style="flat", pca_keeps=round(self.kept, 4), **found, **facts)


def reconstruction(y, x):
    """L1 of pixels and of differences of neighbours; where the picture is plain, differences count twice."""
    loss = (y - x).abs().mean()
    for dim in (2, 3):
        dx = x.diff(dim=dim)
        loss = loss + ((y.diff(dim=dim) - dx).abs() * (1 + (dx.abs() < 0.02).float())).mean()
    return loss


@torch.no_grad()
def errors(model, count):
    """{style: mean absolute error of reconstructions of unseen canvases, as trained and of the held-out sizes and backgrounds}"""
    found = {}
    for style in STYLES:
        for kind, unseen in (("", False), ("_held_out", True)):
            x = to_tensor(Scenes(style, seed=99, unseen=unseen).batch(UNSEEN, count)[0]).to(device())
            y = torch.cat([model.decode(model.encode(part)).clamp(-1, 1) for part in x.split(32)])
            found[style + kind] = round((y - x).abs().mean().item(), 5)
    return found


def load():
    """The frozen autoencoder of the snapshot, which every later stage stands on."""
    return snapshots.frozen(Autoencoder(), snapshots.load(NAME), "autoencoder", NAME)


@torch.no_grad()
def encode(model, pixels):
    """uint8 [B, S, S, 3] -> latents [B, 8, S/8, S/8] in fp16 on the CPU"""
    parts = [model.encode(to_tensor(pixels[k : k + 32]).to(device())).half().cpu() for k in range(0, len(pixels), 32)]
    return torch.cat(parts)


@torch.no_grad()
def pass_through(pixels, disturb):
    """uint8 [B, S, S, 3] encoded, the latents [N, 8, S/8, S/8] changed by ``disturb`` on the CPU, and decoded."""
    model, found = load(), []
    for k in range(0, len(pixels), 32):
        z = disturb(model.encode(to_tensor(pixels[k : k + 32]).to(device())).cpu())
        y = model.decode(z.to(device())).clamp(-1, 1)
        found.append(((y + 1) * 127.5).round().byte().movedim(1, 3).cpu().numpy())
    return np.concatenate(found)
