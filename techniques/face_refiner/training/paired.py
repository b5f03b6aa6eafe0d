"""Trains a face refiner on pairs, after the description in arXiv 2505.02255.

The loss is GRAD(source, refined) + LPIPS(target, refined). GRAD compares differences of neighbouring pixels and so
preserves the structure of the source. LPIPS transfers the look of the target. Two further terms are optional and not
from the paper: an L1 distance, and a patch discriminator conditioned on the source. As in pix2pix (arXiv 1611.07004),
the GAN loss is a binary cross-entropy, and that of the discriminator is halved.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....training.loop import Training, weighted_means
from ....training.metrics import Distance, grad, l1
from ....training.report_lines import best_step, improvement, run_settings
from ..networks.layers import ImageGenerator
from . import base
from .base import RefinerEvaluation, RefinerTrainer
from .pairs import Batch, FaceData


@dataclass(frozen=True, kw_only=True)
class PairedTraining(Training):
    """Settings. The paper uses equal weights for GRAD and LPIPS."""

    steps: int = 2000
    batch_size: int = 4
    learning_rate: float = base.RATE
    grad_weight: float = 1.0  # GRAD is computed on images in -1..1
    metric_weight: float = 1.0
    l1_weight: float = 0.0  # L1 is computed on images in -1..1; pix2pix uses 100 with a gan_weight of 1
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
        """``metric``: the LPIPS term, on images [B, S, S, 3] in 0..1. ``run``: keyword arguments of RefinerTrainer."""
        self.metric = metric if settings.metric_weight else None
        if self.metric is None and not (settings.l1_weight or settings.gan_weight):
            raise ValueError(
                "no loss uses the target: set a metric with a metric_weight above 0, or an l1_weight, or a gan_weight"
            )
        discriminators = [base.new_discriminator(settings.seed, 6, 0, data.crop)] if settings.gan_weight else []
        betas = base.GAN_BETAS if discriminators else base.BETAS
        super().__init__(generator, data, settings, discriminators, betas=betas, **run)

    def _backward(self, step: int, number: int, batch: Batch) -> dict[str, Tensor]:
        count = self.settings.gradient_accumulation
        x, y = (2.0 * t - 1.0 for t in batch)
        z = self.apply(self.generator, x, self._generators(step, number, len(x)))
        parts = self.parts(x, y, z)
        if self.others:
            [discriminator] = self.others
            discriminator.requires_grad_(False)
            parts["gan"] = gan_bce(self.apply(discriminator, torch.cat([x, z], 1)), True)
        loss = self.total(parts)
        (loss / count).backward()
        if self.others:
            discriminator.requires_grad_(True)
            real, fake = (self.apply(discriminator, torch.cat([x, candidate], 1)) for candidate in (y, z.detach()))
            parts["discriminator"] = 0.5 * (gan_bce(real, True) + gan_bce(fake, False))
            (parts["discriminator"] / count).backward()
        return {"loss": loss, **parts}

    def parts(self, x: Tensor, y: Tensor, z: Tensor) -> dict[str, Tensor]:
        """Loss parts without the discriminator, for source x, target y and refined z; all [B, 3, S, S] in -1..1."""
        settings = self.settings
        parts = {"grad": grad(*_rows(x, z)).mean()} if settings.grad_weight else {}
        if self.metric is not None:
            parts["metric"] = self.metric(*(_rows((t + 1.0) / 2.0)[0] for t in (z, y))).mean()
        if settings.l1_weight:
            parts["l1"] = l1(z, y).mean()
        return parts

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        return sum(getattr(self.settings, f"{name}_weight") * value for name, value in parts.items())

    @torch.no_grad()
    def _measure(self) -> RefinerEvaluation:
        """The loss without its GAN part, which depends on the state of the discriminator.

        If the GAN part is the only part that uses the target, the loss is the mean absolute difference from the target.
        """
        source, target = self.data.validation_batch()
        rows, refined = [], self.refine(source)
        for x, y, z in zip(*(t.split(self.settings.batch_size) for t in (source, target, refined.cpu()))):
            x, y, z = (2.0 * t.to(self.device) - 1.0 for t in (x, y, z))
            uses_target = self.metric is not None or self.settings.l1_weight
            row = {"loss": float(self.total(self.parts(x, y, z)) if uses_target else l1(z, y).mean() / 2.0)}
            for name, candidate in (("source", x), ("refined", z)):
                row[f"{name} l1"] = float(l1(candidate, y).mean()) / 2.0
                if self.metric is not None:
                    row[f"{name} metric"] = float(
                        self.metric(*(_rows((t + 1.0) / 2.0)[0] for t in (candidate, y))).mean()
                    )
            rows.append((len(x), row))
        means = weighted_means(rows)
        kinds = ({k.split()[1]: v for k, v in means.items() if k.startswith(kind)} for kind in ("source", "refined"))
        return RefinerEvaluation(means["loss"], *kinds)


def _rows(*images: Tensor) -> list[Tensor]:
    """[B, 3, S, S] as [B, S, S, 3]."""
    return [p.movedim(1, -1) for p in images]


def gan_bce(logits: Tensor, real: bool) -> Tensor:
    """pix2pix's GAN loss: binary cross-entropy of a discriminator's logits, one logit per patch.

    The label of all patches is 1 if ``real``, else 0.
    """
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def report(trainer: PairedTrainer, before: RefinerEvaluation, after: RefinerEvaluation, metric: str = "metric") -> str:
    """The report of a run, in a few lines."""
    lines = [
        run_settings(trainer.loop),
        base.networks_and_data(trainer),
        f"loss on {base.validation_images(trainer)}: {before.loss:.5f} before, {after.loss:.5f} after: {improvement(before.loss, after.loss)}",
        *best_step(trainer.loop),
    ]
    titles = {"metric": f"{metric} distance to the target", "l1": "mean difference from the target"}
    for name, title in titles.items():
        if name in after.source:
            lines.append(
                f"{title}: source {after.source[name]:.5f}, refined {before.refined[name]:.5f} before,"
                f" {after.refined[name]:.5f} after"
            )
    criterion = "metric" if "metric" in after.source else "l1"
    if after.refined[criterion] >= after.source[criterion]:
        lines.append(
            "refined images are no closer to the target than the source: train longer before using the refiner"
        )
    return "\n".join(lines)
