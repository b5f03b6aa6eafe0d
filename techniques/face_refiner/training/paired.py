"""Trains a face refiner on pairs: GRAD(source, refined) + LPIPS(target, refined), as arXiv 2505.02255 has it in words.

The structure is tied to the source, the look to the target. Options that are not the paper's: an L1 distance, and a patch
discriminator that sees the result beside its source, as pix2pix's (arXiv 1611.07004; cross-entropy, its own loss halved).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....training.loop import Training, weighted_means
from ....training.metrics import Distance, grad, l1
from ....training.report_lines import restored, started, verdict
from ..networks.layers import ImageGenerator
from . import base
from .base import RefinerEvaluation, RefinerTrainer
from .pairs import Batch, FaceData


@dataclass(frozen=True, kw_only=True)
class PairedTraining(Training):
    """The paper weighs GRAD and LPIPS alike."""

    steps: int = 2000
    batch_size: int = 4
    learning_rate: float = base.RATE
    grad_weight: float = 1.0  # of pictures in -1..1
    metric_weight: float = 1.0
    l1_weight: float = 0.0  # of pictures in -1..1; pix2pix has 100 beside a gan_weight of 1
    gan_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights("grad_weight", "metric_weight", "l1_weight", "gan_weight")

    def rate(self, step: int) -> float:
        return base.falling_rate(self, step)


class PairedTrainer(RefinerTrainer):
    settings: PairedTraining

    def __init__(
        self,
        generator: ImageGenerator,
        data: FaceData,
        settings: PairedTraining,
        metric: Distance | None = None,
        **run: Any,
    ) -> None:
        """``metric``: in LPIPS's place, of pictures [B, S, S, 3] in 0..1. ``run``: as RefinerTrainer has it."""
        self.metric = metric if settings.metric_weight else None
        if self.metric is None and not (settings.l1_weight or settings.gan_weight):
            raise ValueError(
                "nothing draws the result to the target: set a metric with a metric_weight above 0, or an l1_weight, or a"
                " gan_weight"
            )
        discriminators = [base.new_discriminator(settings.seed, 6, 0, data.crop)] if settings.gan_weight else []
        betas = base.GAN_BETAS if discriminators else base.BETAS
        super().__init__(generator, data, settings, discriminators, betas=betas, **run)

    def _backward(self, step: int, number: int, batch: Batch) -> dict[str, Tensor]:
        count = self.settings.gradient_accumulation
        x, y = (2.0 * t - 1.0 for t in batch)
        z = self.apply(self.generator, x, self._draws(step, number, len(x)))
        parts = self.parts(x, y, z)
        if self.others:
            [discriminator] = self.others
            discriminator.requires_grad_(False)
            parts["gan"] = gan_bce(self.apply(discriminator, torch.cat([x, z], 1)), True)
        loss = self.total(parts)
        (loss / count).backward()
        if self.others:
            discriminator.requires_grad_(True)
            real, fake = (self.apply(discriminator, torch.cat([x, shown], 1)) for shown in (y, z.detach()))
            parts["discriminator"] = 0.5 * (gan_bce(real, True) + gan_bce(fake, False))
            (parts["discriminator"] / count).backward()
        return {"loss": loss, **parts}

    def parts(self, x: Tensor, y: Tensor, z: Tensor) -> dict[str, Tensor]:
        """The parts of the loss of z without the discriminator's, z made of x in place of y; all [B, 3, S, S] in -1..1."""
        settings = self.settings
        found = {"grad": grad(*_rows(x, z)).mean()} if settings.grad_weight else {}
        if self.metric is not None:
            found["metric"] = self.metric(*(_rows((t + 1.0) / 2.0)[0] for t in (z, y))).mean()
        if settings.l1_weight:
            found["l1"] = l1(z, y).mean()
        return found

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        return sum(getattr(self.settings, f"{name}_weight") * value for name, value in parts.items())

    @torch.no_grad()
    def _measure(self) -> RefinerEvaluation:
        """The loss without the discriminator's part, which changes as the discriminator learns. Where nothing else draws to
        the target, the mean difference from it."""
        source, target = self.data.fixed()
        rows, refined = [], self.refine(source)
        for x, y, z in zip(*(t.split(self.settings.batch_size) for t in (source, target, refined.cpu()))):
            x, y, z = (2.0 * t.to(self.device) - 1.0 for t in (x, y, z))
            drawn = self.metric is not None or self.settings.l1_weight
            row = {"loss": float(self.total(self.parts(x, y, z)) if drawn else l1(z, y).mean() / 2.0)}
            for name, shown in (("source", x), ("refined", z)):
                row[f"{name} l1"] = float(l1(shown, y).mean()) / 2.0
                if self.metric is not None:
                    row[f"{name} metric"] = float(self.metric(*(_rows((t + 1.0) / 2.0)[0] for t in (shown, y))).mean())
            rows.append((len(x), row))
        means = weighted_means(rows)
        kinds = ({k.split()[1]: v for k, v in means.items() if k.startswith(kind)} for kind in ("source", "refined"))
        return RefinerEvaluation(means["loss"], *kinds)


def _rows(*pictures: Tensor) -> list[Tensor]:
    """[B, 3, S, S] as [B, S, S, 3]."""
    return [p.movedim(1, -1) for p in pictures]


def gan_bce(logits: Tensor, real: bool) -> Tensor:
    """pix2pix's loss: binary cross-entropy of a discriminator's logits, one for every patch, all ``real`` or all not."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def report(trainer: PairedTrainer, before: RefinerEvaluation, after: RefinerEvaluation, metric: str = "metric") -> str:
    """The report of a run, in a few lines."""
    lines = [
        started(trainer.loop),
        base.networks_and_data(trainer),
        f"loss on {base.validation_images(trainer)}: {before.loss:.5f} before, {after.loss:.5f} after: {verdict(before.loss, after.loss)}",
        *restored(trainer.loop),
    ]
    titles = {"metric": f"{metric} distance to the target", "l1": "mean difference from the target"}
    for name, title in titles.items():
        if name in after.source:
            lines.append(
                f"{title}: source {after.source[name]:.5f}, refined {before.refined[name]:.5f} before,"
                f" {after.refined[name]:.5f} after"
            )
    aim = "metric" if "metric" in after.source else "l1"
    if after.refined[aim] >= after.source[aim]:
        lines.append("refined pictures are no nearer to the target than the source is: train longer before using it")
    return "\n".join(lines)
