"""Training of the demo's face refiner, which refines faces of the 1-step student towards those of its teacher.

The network is a small residual U-Net. The losses and crops are those of Train Face Refiner
(``techniques.face_refiner.training``): the gradient loss GRAD to the source image, L1 to the target image, and a
perceptual distance to the target image. The perceptual distance uses features of the image-text encoder instead of
LPIPS.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...techniques.face_refiner.networks.residual import RefinerConfig
from ...techniques.face_refiner.training.base import FIRST_WEIGHTS, GENERATOR
from ...techniques.face_refiner.training.generators import new_generator
from ...techniques.face_refiner.training.paired import PairedTrainer, PairedTraining
from ...techniques.face_refiner.training.pairs import FaceData
from ...training.generators import seeded_generator
from ...training.metrics import feature_distance
from . import face_pairs, features, loop, sheets, snapshots
from .device import device, has_bfloat16
from .scenes import SIZE

FORMAT = "chorus-face-refiner-1"  # the format in the metadata, see techniques/face_refiner/comfy_files.py
CROP = SIZE


@dataclass(frozen=True, kw_only=True)
class Plan(loop.Plan):
    name: str = "face_refiner"
    snapshot: str = face_pairs.REFINER
    steps: int = 900
    batch: int = 16
    lr: float = 1e-3
    warmup: int = 50
    decay_from: float = 0.5
    ema_decay: float = 0.998
    weight_decay: float = 0.0
    betas: tuple = (0.9, 0.999)
    seed: int = 41
    hours: float = 0.5
    metric_weight: float = 4.0
    l1_weight: float = 1.0
    grad_weight: float = 0.2
    widths: tuple = (24, 40, 64, 96)
    pairs: face_pairs.Plan = face_pairs.PLAN

    def small(self, **changes):
        return super().small(**{"pairs": self.pairs.small(), **changes})


PLAN = Plan()


class Images(Sequence):
    """Float images [3, H, W] in 0..1, stored as uint8 [N, H, W, 3] and converted on access, to use a quarter of the
    memory."""

    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.pixels[index].movedim(-1, 0).float() / 255


class Task:
    def __init__(self, plan, report=print):
        self.plan = plan
        pairs = (Images(side) for side in face_pairs.load_pairs(plan.pairs, plan.pairs.training))
        settings = PairedTraining(
            steps=plan.steps,
            batch_size=plan.batch,
            learning_rate=plan.lr,
            ema_decay=plan.ema_decay,
            seed=plan.seed,
            metric_weight=plan.metric_weight,
            l1_weight=plan.l1_weight,
            grad_weight=plan.grad_weight,
        )
        generator = new_generator(
            RefinerConfig(widths=plan.widths), seeded_generator(plan.seed, FIRST_WEIGHTS, GENERATOR)
        )
        self.trainer = PairedTrainer(
            generator,
            FaceData(*pairs, CROP, paired=True, validation_fraction=0.02),
            settings,
            feature_distance(features.ImageFeatures(features.load())),
            device=device(),
            precision=torch.bfloat16 if has_bfloat16() else torch.float32,
        )
        self.network = self.trainer.generator

    def snapshot(self):
        return snapshots.load(self.plan.snapshot)

    def loss(self, step):
        source, target = (side.to(device()) for side in self.trainer.training_batch(step))
        x, y = 2 * source - 1, 2 * target - 1
        return self.trainer.total(self.trainer.parts(x, y, self.trainer.apply(self.network, x)))

    def take_over(self, network, step=0):
        """Copy the EMA weights of ``network`` into the trainer, which evaluates and exports them."""
        with torch.no_grad():
            torch._foreach_copy_(self.trainer.loop.average, list(network.parameters()))
        self.trainer.loop.done = step

    def sheet(self, network):
        """An image with three rows: the sources, refined images and targets of validation pairs."""
        self.take_over(network)
        columns = zip(*self.trainer.examples(12))
        rows = [2 * torch.stack([image.cpu() for image in row]) - 1 for row in columns]
        return sheets.to_image(torch.cat(rows), len(rows[0]))

    def export(self, network, facts):
        self.take_over(network, facts["step"])
        found = self.trainer.loop.evaluate()
        distances = {"source": found.source, "refined": found.refined}
        print(f"{self.plan.name}: distance to the target on unseen pairs: {distances}", flush=True)
        facts = {
            **facts,
            **self.trainer.facts(found),
            "format": FORMAT,
            "network": str(self.network.config),
            "unseen": json.dumps(distances),
        }
        snapshots.save(self.plan.snapshot, self.trainer.weights(), style="glossy", **facts)
