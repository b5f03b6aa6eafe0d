"""The independent evaluator: one concept per canvas, all equally often, in both styles.

SeedSelect is led by the image-text encoder, so another network must say whether it helped. The seed is that of no other
stage, but sizes, places and backgrounds are so few that about a third of these canvases also occur among those of general.
So every picture is rotated, by at least 3 degrees, and bent: no other network trains on it. The references are of the
held-out sizes and backgrounds.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ...demo.emoji.concepts import STYLES
from . import autoencoder, loop, sheets, snapshots
from .autoencoder import to_tensor
from .device import autocast, device
from .networks.classifier import ConceptClassifier
from .scenes import Scenes

NAME = "classifier"
SMALLEST, LARGEST = 3, 8  # degrees of rotation, either way


@dataclass(frozen=True, kw_only=True)
class Plan(loop.Plan):
    name: str = NAME
    steps: int = 6000
    batch: int = 48
    lr: float = 3e-3
    warmup: int = 100
    ema_decay: float = 0.995
    seed: int = 61
    canvases: int = 6000  # of each style
    hours: float = 0.2

    def small(self, **changes):
        return super().small(**{"canvases": 24, **changes})


PLAN = Plan()


def single_concepts(style, count, *, seed, unseen=False, start=0):
    """uint8 [count, 128, 128, 3] of canvases with one concept each, and the concepts [count]."""
    pixels, _, scenes = Scenes(style, seed=seed, balanced=True, unseen=unseen, alone=1.0).batch(start, count)
    return pixels, torch.tensor([scene.items[0].concept for scene in scenes])


class Task:
    def __init__(self, plan):
        torch.manual_seed(plan.seed)
        self.plan, self.network = plan, ConceptClassifier()
        pools = [single_concepts(style, plan.canvases, seed=plan.seed) for style in STYLES]
        self.pool, self.concepts = np.concatenate([p for p, _ in pools]), torch.cat([c for _, c in pools])
        self.again = regenerated(self.pool[::2], plan.seed)  # half of the pool once more, as a decoder gives it

    def snapshot(self):
        return snapshots.load(NAME)

    def loss(self, step):
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + step)
        rows = torch.randint(len(self.pool), (self.plan.batch,), generator=generator)
        decoded = (rows % 2 == 0) & (torch.rand(len(rows), generator=generator) < 0.7)
        pixels = self.pool[rows.numpy()]
        pixels[decoded.numpy()] = self.again[rows[decoded].numpy() // 2]
        x = distort(to_tensor(pixels) / 2 + 0.5, generator)
        with autocast():
            logits = self.network(x.to(device()))
        return F.cross_entropy(logits.float(), self.concepts[rows].to(device()), label_smoothing=0.05)

    def sheet(self, network):
        """Canvases of the held-out sizes and backgrounds that it names wrongly."""
        wrong = []
        for style in STYLES:
            pixels, concepts = single_concepts(style, self.plan.evaluated, seed=99, unseen=True)
            x = to_tensor(pixels)
            wrong.append(x[named(network, x) != concepts][:8])
        wrong = torch.cat(wrong)
        return sheets.to_image(wrong, 8) if len(wrong) else None

    def export(self, network, facts):
        found = accuracies(network, self.plan.evaluated)
        print(f"{NAME}: accuracy {found}", flush=True)
        snapshots.save(NAME, network.state_dict(), style="flat", **found, **facts)


def rotations(u):
    """Angles in radians, of either direction and never near 0, for ``u`` [B] in 0..1."""
    low, high = math.radians(SMALLEST), math.radians(LARGEST)
    v = 2 * u - 1
    return torch.where(v < 0, -1.0, 1.0) * (low + (high - low) * v.abs())


def regenerated(pixels, seed):
    """The pictures encoded, disturbed as a denoiser of few steps leaves latents (fine and coarse noise), and decoded."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(z):
        fine, coarse = torch.randn(z.shape, generator=generator), torch.randn(*z.shape[:2], 4, 4, generator=generator)
        coarse = F.interpolate(coarse, z.shape[2:], mode="bicubic")
        strength = 0.6 * torch.rand(len(z), 1, 1, 1, generator=generator)
        return z + strength * torch.where(torch.rand(len(z), 1, 1, 1, generator=generator) < 0.5, fine, coarse)

    return autoencoder.pass_through(pixels, disturb)


def distort(x, generator):
    """Rotated, shifted, bent, recoloured and softened pictures [B, 3, H, W] in 0..1."""
    count, size = len(x), x.shape[2:]
    uniform = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    some = lambda share: uniform(count, 1, 1, 1) < share  # noqa: E731
    angle, zoom = rotations(uniform(count)), 1 + 0.2 * (uniform(count) - 0.5)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * zoom, -angle.sin() * zoom
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * zoom, angle.cos() * zoom
    theta[:, :, 2] = 0.2 * (uniform(count, 2) - 0.5)
    bend = F.interpolate(0.12 * (uniform(count, 2, 5, 5) - 0.5), size, mode="bicubic").movedim(1, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False) + bend
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    grey = x.mean(1, keepdim=True)
    x = torch.where(some(0.5), grey + (x - grey) * (0.5 + uniform(count, 1, 1, 1)), x)  # saturation
    x = torch.where(some(0.5), x.clamp(1e-3, 1) ** (0.6 + 0.9 * uniform(count, 1, 1, 1)), x)  # gamma
    x = torch.where(some(0.3), x + 0.15 * (uniform(count, 3, 1, 1) - 0.5), x)
    small = F.interpolate(x, scale_factor=0.5, mode="area")
    return torch.where(some(0.3), F.interpolate(small, size, mode="bilinear"), x).clamp(0, 1)


@torch.no_grad()
def named(network, x):
    """The most likely concept [B] of pictures [B, 3, 128, 128] in -1..1."""
    return torch.cat([network((part / 2 + 0.5).to(device())).argmax(1).cpu() for part in x.split(100)])


def accuracies(network, count):
    """{style: share of canvases of one concept that are named right, upright as trained and of the held-out split}"""
    found = {}
    for style in STYLES:
        for kind, unseen in (("", False), ("_held_out", True)):
            pixels, concepts = single_concepts(style, count, seed=99, unseen=unseen)
            found[style + kind] = round((named(network, to_tensor(pixels)) == concepts).float().mean().item(), 4)
    return found
