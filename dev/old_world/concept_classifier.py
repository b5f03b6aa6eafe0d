"""The independent evaluator: one sign per canvas, all signs equally often, Noto style.

SeedSelect is led by the image-text encoder, so another evaluator says whether it helped. No rendering is shared: these are
all tilted by ANGLES, the other networks learned upright signs, and SeedSelect's references are of the held-out split.
What the pictures suffer is of other kinds too than in vision.py.

The committed weights are 1,262 of the 2,000 steps (80,768 canvases): 14 minutes at low priority on two busy cores, in two
runs, the second by --minutes. On a free core a step takes about 0.2 seconds.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ...demo.modules import load_vae_module
from ..weights import save_weights
from . import loop
from .canvas import SIZE, Canvases
from .concept_network import ConceptClassifier
from .device import autocast

ANGLES = (-5, -3, 3, 5)


@dataclass(frozen=True)
class Plan:
    name: str = "concept_classifier"
    steps: int = 2000
    batch: int = 64
    lr: float = 3e-3
    warmup: int = 100
    decay: float = 0.995
    seed: int = 31


class Tilted(Canvases):
    """Canvases with one sign that no other network was trained on, and no reference shows."""

    def __init__(self, seed, draw=True):
        super().__init__("noto", seed=seed, balanced=True, one=1.0, draw=draw)
        self.angles = ANGLES


class Student(nn.Module):
    """The loss of a batch."""

    def __init__(self):
        super().__init__()
        self.classifier = ConceptClassifier()

    def forward(self, images, signs):
        with autocast():
            logits = self.classifier(images)
        return F.cross_entropy(logits.float(), signs, label_smoothing=0.05)


class Data(loop.Batches):
    """Batches with what a generated picture may suffer."""

    def __init__(self, plan, vae, worker=0, workers=1):
        super().__init__(plan, Tilted(plan.seed), worker, workers)
        self.vae, self.worker = vae, worker

    def batch(self, k):
        """images [B, 3, 64, 64] in 0..1, signs [B]"""
        images, _, scenes = self.drawn(k)
        generator = torch.Generator().manual_seed((self.plan.seed * 1_000_003 + k) * 64 + self.worker)
        return spoil(images.float() / 255, self.vae, generator), torch.tensor([s.items[0].sign for s in scenes])


@torch.no_grad()
def spoil(x, vae, generator):
    """Bends, recolours and softens some of the pictures, and paints some again from disturbed latents."""
    n = len(x)
    draw = lambda *s: torch.rand(*s, generator=generator)  # noqa: E731
    some = lambda share: draw(n, 1, 1, 1) < share  # noqa: E731
    x = torch.where(some(0.6), bend(x, draw), x)
    grey = x.mean(1, keepdim=True)
    x = torch.where(some(0.5), grey + (x - grey) * (0.5 + draw(n, 1, 1, 1)), x)  # saturation
    x = torch.where(some(0.5), x.clamp(1e-3, 1) ** (0.6 + 0.9 * draw(n, 1, 1, 1)), x)  # gamma
    x = torch.where(some(0.3), x + 0.15 * (draw(n, 3, 1, 1) - 0.5), x)
    again = draw(n) < 0.5
    x = x.clamp(0, 1)
    x[again] = repaint(x[again], vae, generator)
    small = F.interpolate(x, scale_factor=0.5, mode="area")
    x = torch.where(some(0.3), F.interpolate(small, (SIZE, SIZE), mode="bilinear"), x)
    return x.clamp(0, 1)


def repaint(x, vae, generator):
    """The decoder's own softness and blotches, from latents as rough as a denoiser with few steps leaves them."""
    n = len(x)
    z = vae.encode(2 * x - 1)
    fine = torch.randn(z.shape, generator=generator)
    coarse = F.interpolate(torch.randn(*z.shape[:2], 4, 4, generator=generator), z.shape[2:], mode="bicubic")
    z = z + torch.where(torch.arange(n)[:, None, None, None] % 2 == 0, fine, coarse) * torch.linspace(0, 0.6, n).view(
        -1, 1, 1, 1
    )
    with autocast():
        return vae.decode(z).float() / 2 + 0.5


def bend(x, draw):
    """Pictures whose pixels come from up to about three pixels away, by a smooth field, after a whole shift."""
    n = len(x)
    field = F.interpolate(0.2 * (draw(n, 2, 5, 5) - 0.5), (SIZE, SIZE), mode="bicubic").movedim(1, 3)
    shift = (8 * (draw(n, 1, 1, 2) - 0.5)).round() * 2 / SIZE
    straight = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x, straight + field + shift, padding_mode="border", align_corners=False)


@torch.no_grad()
def accuracy(classifier, canvases, count=980):
    """Share of the first canvases whose sign is named first; they must hold one sign each."""
    pixels, _, scenes = canvases.batch(0, count)
    x = torch.from_numpy(pixels).movedim(3, 1).float() / 255
    said = torch.cat([classifier(part).argmax(1) for part in x.split(196)])
    return (said == torch.tensor([s.items[0].sign for s in scenes])).float().mean().item()


def job(plan, worker, workers):
    tests = {
        "unseen": Canvases("noto", seed=99, balanced=True, unseen=True, one=1.0),
        "upright": Canvases("noto", seed=99, balanced=True, one=1.0),
    }

    def export(average, step, spent, log):
        state = {name: value.cpu() for name, value in loop.part_of(average, "classifier.").items()}
        classifier = ConceptClassifier().eval()
        classifier.load_state_dict(state)
        found = {name: round(accuracy(classifier, canvases), 4) for name, canvases in tests.items()}
        facts = loop.facts(plan, step, spent, log, canvases=step * plan.batch, **found)
        print(f"\n{plan.name}: {facts}", flush=True)
        save_weights(plan.name, state, **facts)

    return Student(), Data(plan, load_vae_module(), worker, workers), export


def main(minutes=None, workers=1):
    loop.train(Plan(), job, minutes, workers, save_minutes=3.0)
