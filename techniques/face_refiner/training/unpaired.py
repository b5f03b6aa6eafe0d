"""Trains a face refiner on two sets of pictures that know nothing of each other: CycleGAN (arXiv 1703.10593).

G: source -> target is the refiner; F: target -> source and the discriminators of both sides are needed for training alone, and
begin anew in every run. Losses, weights and the pool of older results are those of pytorch-CycleGAN-and-pix2pix: least
squares, cycle 10, identity 0.5 of it, 50 pictures, each discriminator's loss halved.

Whether it learned is told by how far the refined held-out pictures, as a set, are from those of the target.

Shapes: B samples, S the side of a crop, N and M pictures, D features.
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
from ....training.report_lines import restored, started, verdict
from ..networks.layers import ImageGenerator
from . import base
from .base import RefinerEvaluation, RefinerTrainer
from .generators import new_generator
from .pairs import SOURCE, TARGET, Batch, FaceData

POOL = 24  # what a generator is for, in its key
SCALES = 3  # halvings at which colours_and_detail looks
FAINTEST = 5e-3  # spread below which it sees no difference
HOLD = 100  # steps, at most a tenth of the run, in which a resumed G waits for what begins anew

Features = Callable[[Tensor], Tensor]  # pictures [B, S, S, 3] in 0..1 -> [B, D]


@dataclass(frozen=True, kw_only=True)
class CycleTraining(Training):
    steps: int = 2000
    batch_size: int = 4
    learning_rate: float = base.RATE
    cycle_weight: float = 10.0
    identity_weight: float = 0.5  # times cycle_weight
    pool_size: int = 50  # older results of each generator that its discriminator is shown in turn with new ones

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights("cycle_weight", "identity_weight")
        if self.pool_size < 0:
            raise ValueError(f"pool_size {self.pool_size} is negative; 0 shows the discriminators new results only")

    def rate(self, step: int) -> float:
        return base.falling_rate(self, step)


class ImagePool:
    """Older results. Until it is full it keeps all that come and returns them; then it returns each, or, as often, one of
    its own, and keeps the new one in its place."""

    def __init__(self, size: int) -> None:
        self.size, self.pictures = size, []

    def __call__(self, pictures: Tensor, draws: torch.Generator) -> Tensor:
        found = []
        for picture in pictures.unbind(0):
            if len(self.pictures) < self.size:
                self.pictures.append(picture.clone())
            elif self.size and float(torch.rand((), generator=draws)) >= 0.5:
                place = int(torch.randint(self.size, (), generator=draws))
                # found keeps the old one, whose place in the list alone is taken
                self.pictures[place], picture = picture.clone(), self.pictures[place]
            found.append(picture)
        return torch.stack(found)


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
        """``features``: by which held-out sets are compared; None: colours and detail. ``run``: as RefinerTrainer has it."""
        back = new_generator(generator.config, seeded_generator(settings.seed, base.FIRST_WEIGHTS, base.BACK))
        discriminators = [base.new_discriminator(settings.seed, 3, side, data.crop) for side in (SOURCE, TARGET)]
        super().__init__(generator, data, settings, [back, *discriminators], **run)
        self.back, *self.discriminators = self.others
        self.pools = [ImagePool(settings.pool_size) for _ in self.discriminators]
        self.features = features or colours_and_detail
        self.hold = min(HOLD, settings.steps // 10) if self.loop.resumed else 0

    def _backward(self, step: int, number: int, batch: Batch) -> dict[str, Tensor]:
        settings, count = self.settings, self.settings.gradient_accumulation
        a, b = (2.0 * t - 1.0 for t in batch)
        draws = self._draws(step, number, len(a))
        if number == 0:
            key = settings.seed, POOL, self.loop.first_step + step
            self._pool_draws = [seeded_generator(*key, side) for side in (SOURCE, TARGET)]

        def run(network: nn.Module, x: Tensor) -> Tensor:
            return self.apply(network, x, draws)

        for discriminator in self.discriminators:
            discriminator.requires_grad_(False)
        fake_b, fake_a = run(self.generator, a), run(self.back, b)
        fakes = fake_a, fake_b  # by the side that they pretend to be of
        judged = [lsgan(self.apply(d, fake), True) for d, fake in zip(self.discriminators, fakes)]
        parts = {"gan": torch.stack(judged).sum()}
        parts["cycle"] = l1(run(self.back, fake_b), a).mean() + l1(run(self.generator, fake_a), b).mean()
        if settings.identity_weight:
            parts["identity"] = l1(run(self.generator, b), b).mean() + l1(run(self.back, a), a).mean()
        loss = parts["gan"] + settings.cycle_weight * (
            parts["cycle"] + settings.identity_weight * parts.get("identity", 0.0)
        )
        (loss / count).backward()
        if step < self.hold:
            self.generator.zero_grad()
        losses = []
        sides = zip(self.discriminators, self.pools, self._pool_draws, (a, b), fakes)
        for discriminator, pool, pool_draws, real, fake in sides:
            discriminator.requires_grad_(True)
            shown = pool(fake.detach(), pool_draws)
            losses.append(
                0.5 * (lsgan(self.apply(discriminator, real), True) + lsgan(self.apply(discriminator, shown), False))
            )
        parts["discriminators"] = torch.stack(losses).sum()
        (parts["discriminators"] / count).backward()
        return {"loss": loss, **parts}

    @torch.no_grad()
    def _measure(self) -> RefinerEvaluation:
        """How far the refined pictures and the sources are from the targets, as sets."""
        source, target = self.data.fixed()
        sets = [self._seen(p) for p in (target, source, self.refine(source))]
        if self.features is colours_and_detail:
            # of both together: a single target has no spread
            sets = scaled_by(torch.cat(sets[:2]), sets)
        wanted, plain, refined = sets
        distances = {"source": energy_distance(plain, wanted), "refined": energy_distance(refined, wanted)}
        return RefinerEvaluation(distances["refined"], *({"set": value} for value in distances.values()))

    def _seen(self, pictures: Tensor) -> Tensor:
        rows = pictures.movedim(1, -1).to(self.device).split(self.settings.batch_size)
        return torch.cat([self.features(part).double().cpu() for part in rows])


def lsgan(found: Tensor, real: bool) -> Tensor:
    """The least-squares GAN loss of a discriminator's numbers, one for every patch, all ``real`` or all not."""
    return F.mse_loss(found, torch.full_like(found, float(real)))


def colours_and_detail(pictures: Tensor) -> Tensor:
    """[B, D] of pictures [B, S, S, 3]: mean and spread of each channel, and how strong its edges are at several scales."""
    x = pictures.movedim(-1, 1)
    found = [x.mean((2, 3)), x.std((2, 3), correction=0)]
    for _ in range(SCALES):
        if min(x.shape[-2:]) < 2:
            break
        found += [x.diff(dim=axis).abs().mean((2, 3)) for axis in (2, 3)]
        x = F.avg_pool2d(x, 2)
    return torch.cat(found, 1)


def scaled_by(rows: Tensor, sets: Sequence[Tensor]) -> list[Tensor]:
    """``sets`` [N, D] in units of how much each feature varies in ``rows``."""
    spread = rows.std(0, correction=0).clamp(min=FAINTEST)
    return [one / spread for one in sets]


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a − b| − E|a − a'| − E|b − b'| of rows [N, D] and [M, D] (the square of Székely and Rizzo's): 0 for equal
    sets, else more. Other than the Fréchet distance it needs no more rows than features."""
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
        started(trainer.loop),
        base.networks_and_data(trainer),
        f"distance of {base.validation_images(trainer)} from the target's, as sets, in {features}: source {source:.5f}, refined"
        f" {before.loss:.5f} before, {after.loss:.5f} after: {verdict(before.loss, after.loss)}",
        *restored(trainer.loop),
    ]
    if after.loss >= source:
        lines.append("refined pictures are no nearer to the target's than the source is: train longer before using it")
    else:
        lines.append(f"{1.0 - after.loss / source:.0%} of the distance is closed")
    if trainer.hold:
        lines.append(
            f"the way back and the discriminators began anew; the refiner waited {trainer.hold} steps for them"
        )
    return "\n".join(lines)
