"""Trains a face refiner on unpaired images: CycleGAN (arXiv 1703.10593).

G: source -> target is the refiner. Training also uses a generator F: target -> source, and one discriminator each for
source and target images. Every run initialises these three networks anew.

Losses, weights and the image pool are those of pytorch-CycleGAN-and-pix2pix: least-squares GAN losses (halved for the
discriminators), a cycle weight of 10, an identity weight of 0.5 times the cycle weight, and a pool of 50 images.

The validation loss is the distance between the set of refined and the set of target validation images.

Shapes: B samples, S the side of a crop, N and M images, D features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....training.generators import seeded_generator
from ....training.loop import Training
from ....training.metrics import l1
from ....training.report_lines import best_step, improvement, run_settings
from ..networks.layers import ImageGenerator
from . import base
from .base import RefinerEvaluation, RefinerTrainer
from .generators import new_generator
from .pairs import SOURCE, TARGET, Batch, FaceData

POOL = 24  # part of the key that seeds the image pools' random generators
SCALES = 3  # number of scales in colours_and_detail; each has half the size of the previous scale
MIN_SPREAD = 5e-3  # smallest standard deviation by which a feature is divided
# A G that was trained before is frozen for this many steps (at most a tenth of the run), because F and the
# discriminators start untrained.
FROZEN_STEPS = 100

Features = Callable[[Tensor], Tensor]  # images [B, S, S, 3] in 0..1 -> [B, D]


@dataclass(frozen=True, kw_only=True)
class CycleTraining(Training):
    steps: int = 2000
    batch_size: int = 4
    learning_rate: float = base.RATE
    cycle_weight: float = 10.0
    identity_weight: float = 0.5  # times cycle_weight
    pool_size: int = 50  # number of earlier results of each generator, mixed into the input of its discriminator

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights("cycle_weight", "identity_weight")
        if self.pool_size < 0:
            raise ValueError(f"pool_size {self.pool_size} is negative; use 0 for no pool")

    def rate(self, step: int) -> float:
        return base.falling_rate(self, step)


class ImagePool:
    """Pool of earlier results of a generator.

    Until the pool is full, each new image is stored and returned. Afterwards, with probability 0.5, a stored image is
    returned and replaced in the pool by the new image; otherwise the new image is returned and not stored.
    """

    def __init__(self, size: int) -> None:
        self.size, self.images = size, []

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        result = []
        for image in images.unbind(0):
            if len(self.images) < self.size:
                self.images.append(image.clone())
            elif self.size and float(torch.rand((), generator=generator)) >= 0.5:
                slot = int(torch.randint(self.size, (), generator=generator))
                # the old image itself is returned; only its slot is reused
                self.images[slot], image = image.clone(), self.images[slot]
            result.append(image)
        return torch.stack(result)


class CycleTrainer(RefinerTrainer):
    settings: CycleTraining

    def __init__(
        self,
        generator: ImageGenerator,
        data: FaceData,
        settings: CycleTraining,
        features: Features | None = None,
        **run: Any,
    ) -> None:
        """``features``: features in which the validation sets are compared; None means ``colours_and_detail``.
        ``run``: keyword arguments of RefinerTrainer."""
        back = new_generator(generator.config, seeded_generator(settings.seed, base.FIRST_WEIGHTS, base.BACK))
        discriminators = [base.new_discriminator(settings.seed, 3, side, data.crop) for side in (SOURCE, TARGET)]
        super().__init__(generator, data, settings, [back, *discriminators], **run)
        self.back, *self.discriminators = self.others
        self.pools = [ImagePool(settings.pool_size) for _ in self.discriminators]
        self.features = features or colours_and_detail
        self.frozen_steps = min(FROZEN_STEPS, settings.steps // 10) if self.loop.resumed else 0

    def _backward(self, step: int, number: int, batch: Batch) -> dict[str, Tensor]:
        settings, count = self.settings, self.settings.gradient_accumulation
        a, b = (2.0 * t - 1.0 for t in batch)
        generators = self._generators(step, number, len(a))
        if number == 0:
            key = settings.seed, POOL, self.loop.first_step + step
            self._pool_generators = [seeded_generator(*key, side) for side in (SOURCE, TARGET)]

        def run(network: nn.Module, x: Tensor) -> Tensor:
            return self.apply(network, x, generators)

        for discriminator in self.discriminators:
            discriminator.requires_grad_(False)
        fake_b, fake_a = run(self.generator, a), run(self.back, b)
        fakes = fake_a, fake_b  # in the order of the discriminators: source, target
        gan_losses = [lsgan(self.apply(d, fake), True) for d, fake in zip(self.discriminators, fakes)]
        parts = {"gan": torch.stack(gan_losses).sum()}
        parts["cycle"] = l1(run(self.back, fake_b), a).mean() + l1(run(self.generator, fake_a), b).mean()
        if settings.identity_weight:
            parts["identity"] = l1(run(self.generator, b), b).mean() + l1(run(self.back, a), a).mean()
        loss = parts["gan"] + settings.cycle_weight * (
            parts["cycle"] + settings.identity_weight * parts.get("identity", 0.0)
        )
        (loss / count).backward()
        if step < self.frozen_steps:
            self.generator.zero_grad()
        losses = []
        sides = zip(self.discriminators, self.pools, self._pool_generators, (a, b), fakes)
        for discriminator, pool, pool_generator, real, fake in sides:
            discriminator.requires_grad_(True)
            pooled = pool(fake.detach(), pool_generator)
            losses.append(
                0.5 * (lsgan(self.apply(discriminator, real), True) + lsgan(self.apply(discriminator, pooled), False))
            )
        parts["discriminators"] = torch.stack(losses).sum()
        (parts["discriminators"] / count).backward()
        return {"loss": loss, **parts}

    @torch.no_grad()
    def _measure(self) -> RefinerEvaluation:
        """The distances of the refined images and of the source images from the set of target images."""
        source, target = self.data.validation_batch()
        sets = [self._set_features(p) for p in (target, source, self.refine(source))]
        if self.features is colours_and_detail:
            # divided by the standard deviation over targets and sources together: with a single target image, the
            # standard deviation over targets would be 0
            sets = scaled_by(torch.cat(sets[:2]), sets)
        target_rows, source_rows, refined_rows = sets
        distances = {
            "source": energy_distance(source_rows, target_rows),
            "refined": energy_distance(refined_rows, target_rows),
        }
        return RefinerEvaluation(distances["refined"], *({"set": value} for value in distances.values()))

    def _set_features(self, images: Tensor) -> Tensor:
        rows = images.movedim(1, -1).to(self.device).split(self.settings.batch_size)
        return torch.cat([self.features(part).double().cpu() for part in rows])


def lsgan(scores: Tensor, real: bool) -> Tensor:
    """The least-squares GAN loss of a discriminator's scores, one score per patch.

    The label of all patches is 1 if ``real``, else 0.
    """
    return F.mse_loss(scores, torch.full_like(scores, float(real)))


def colours_and_detail(images: Tensor) -> Tensor:
    """Features [B, D] of images [B, S, S, 3]: mean and standard deviation per channel, mean gradients at several scales."""
    x = images.movedim(-1, 1)
    result = [x.mean((2, 3)), x.std((2, 3), correction=0)]
    for _ in range(SCALES):
        if min(x.shape[-2:]) < 2:
            break
        result += [x.diff(dim=axis).abs().mean((2, 3)) for axis in (2, 3)]
        x = F.avg_pool2d(x, 2)
    return torch.cat(result, 1)


def scaled_by(rows: Tensor, sets: Sequence[Tensor]) -> list[Tensor]:
    """``sets`` [N, D], each feature divided by its standard deviation in ``rows``."""
    spread = rows.std(0, correction=0).clamp(min=MIN_SPREAD)
    return [one / spread for one in sets]


def energy_distance(a: Tensor, b: Tensor) -> float:
    """The square of Székely and Rizzo's energy distance of two sets of rows, ``a`` [N, D] and ``b`` [M, D].

    2 E|a − b| − E|a − a'| − E|b − b'|, where a and a' are rows of the first set, b and b' rows of the second. 0 for
    equal sets, else positive. Unlike the Fréchet distance, it works with fewer rows than features.
    """
    return float(2.0 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def report(
    trainer: CycleTrainer,
    before: RefinerEvaluation,
    after: RefinerEvaluation,
    features: str = "colours and detail",
) -> str:
    """The report of a run, in a few lines."""
    source = after.source["set"]
    lines = [
        run_settings(trainer.loop),
        base.networks_and_data(trainer),
        f"distance from the set of target images in {features}, on {base.validation_images(trainer)}:"
        f" source {source:.5f}, refined {before.loss:.5f} before, {after.loss:.5f} after:"
        f" {improvement(before.loss, after.loss)}",
        *best_step(trainer.loop),
    ]
    if after.loss >= source:
        lines.append(
            "refined images are no closer to the target than the source: train longer before using the refiner"
        )
    else:
        lines.append(f"{1.0 - after.loss / source:.0%} of the distance is closed")
    if trainer.frozen_steps:
        lines.append(
            "the reverse generator and the discriminators started untrained; the refiner was frozen for their first"
            f" {trainer.frozen_steps} steps"
        )
    return "\n".join(lines)
