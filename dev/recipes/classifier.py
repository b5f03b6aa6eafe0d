"""Training of the independent evaluator, on canvases of both styles with one concept; all concepts are equally
frequent.

SeedSelect optimises a score of the image-text encoder, so its results are evaluated by a separate network. No other
stage uses the classifier's seed. But there are few sizes, positions and backgrounds, so about a third of these canvases
also occur in the training of general. Therefore every image is rotated by at least 3 degrees and warped, and no other
network trains on such images. SeedSelect's references differ too: they have the sizes and backgrounds that are excluded
from training.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ...demo.concepts import STYLES
from . import autoencoder, loop, sheets, snapshots
from .autoencoder import to_tensor
from .device import autocast, device
from .networks.classifier import ConceptClassifier
from .scenes import Scenes

NAME = "classifier"
SMALLEST, LARGEST = 3, 8  # degrees of rotation, in either direction


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
    """(canvases with one concept each, uint8 [count, 128, 128, 3]; class numbers of the concepts [count])"""
    pixels, _, scenes = Scenes(style, seed=seed, balanced=True, unseen=unseen, alone=1.0).batch(start, count)
    return pixels, torch.tensor([scene.items[0].concept for scene in scenes])


class Task:
    def __init__(self, plan):
        torch.manual_seed(plan.seed)
        self.plan, self.network = plan, ConceptClassifier()
        pools = [single_concepts(style, plan.canvases, seed=plan.seed) for style in STYLES]
        self.pool, self.concepts = np.concatenate([p for p, _ in pools]), torch.cat([c for _, c in pools])
        self.again = regenerated(self.pool[::2], plan.seed)  # half of the pool, decoded from latents with noise

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
        """An image of misclassified canvases with unseen sizes and backgrounds; None if there are none."""
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
    """Angles of SMALLEST to LARGEST degrees in either direction, in radians, for ``u`` [B] in 0..1."""
    low, high = math.radians(SMALLEST), math.radians(LARGEST)
    v = 2 * u - 1
    return torch.where(v < 0, -1.0, 1.0) * (low + (high - low) * v.abs())


def regenerated(pixels, seed):
    """The images after encoding, adding fine or coarse noise, and decoding.

    The noise is similar to the errors of few-step sampling.
    """
    generator = torch.Generator().manual_seed(seed)

    def disturb(z):
        fine, coarse = torch.randn(z.shape, generator=generator), torch.randn(*z.shape[:2], 4, 4, generator=generator)
        coarse = F.interpolate(coarse, z.shape[2:], mode="bicubic")
        strength = 0.6 * torch.rand(len(z), 1, 1, 1, generator=generator)
        return z + strength * torch.where(torch.rand(len(z), 1, 1, 1, generator=generator) < 0.5, fine, coarse)

    return autoencoder.pass_through(pixels, disturb)


def distort(x, generator):
    """Rotate, shift, warp, recolour and blur images [B, 3, H, W] in 0..1 at random."""
    count, size = len(x), x.shape[2:]
    uniform = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    some = lambda share: uniform(count, 1, 1, 1) < share  # noqa: E731
    angle, zoom = rotations(uniform(count)), 1 + 0.2 * (uniform(count) - 0.5)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * zoom, -angle.sin() * zoom
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * zoom, angle.cos() * zoom
    theta[:, :, 2] = 0.2 * (uniform(count, 2) - 0.5)
    warp = F.interpolate(0.12 * (uniform(count, 2, 5, 5) - 0.5), size, mode="bicubic").movedim(1, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False) + warp
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    grey = x.mean(1, keepdim=True)
    x = torch.where(some(0.5), grey + (x - grey) * (0.5 + uniform(count, 1, 1, 1)), x)  # saturation
    x = torch.where(some(0.5), x.clamp(1e-3, 1) ** (0.6 + 0.9 * uniform(count, 1, 1, 1)), x)  # gamma
    x = torch.where(some(0.3), x + 0.15 * (uniform(count, 3, 1, 1) - 0.5), x)
    small = F.interpolate(x, scale_factor=0.5, mode="area")
    return torch.where(some(0.3), F.interpolate(small, size, mode="bilinear"), x).clamp(0, 1)


@torch.no_grad()
def named(network, x):
    """The most likely concept [B] of images [B, 3, 128, 128] in -1..1."""
    return torch.cat([network((part / 2 + 0.5).to(device())).argmax(1).cpu() for part in x.split(100)])


def evaluation_sets(count):
    """Yields (name, images [N, 3, 128, 128] in -1..1, concepts) for each style, with seen and with unseen sizes and
    backgrounds.

    The images are not rotated.
    """
    for style in STYLES:
        for kind, unseen in (("", False), ("_held_out", True)):
            pixels, concepts = single_concepts(style, count, seed=99, unseen=unseen)
            yield style + kind, to_tensor(pixels), concepts


def accuracies(network, count):
    """{evaluation set: accuracy}"""
    sets = evaluation_sets(count)
    return {name: round((named(network, x) == concepts).float().mean().item(), 4) for name, x, concepts in sets}
