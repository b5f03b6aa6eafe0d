"""The training run of Train Cas-DM Head: metric, preview and saving."""

from collections.abc import Callable
from typing import Any

import torch

from ...host.training_images import TrainingImages, preview_images
from ...host.training_metrics import ELEMENTWISE, FEATURES, NONE, image_distance
from ...host.training_run import TrainingRun
from ...training.metrics import CropMetric
from .comfy_files import save_head
from .comfy_training import GuidedPrediction
from .network import to_file
from .report import report
from .training import CasDMTrainer, LatentMetric
from .view import draw_examples


def latent_metric(kind: str, images: TrainingImages, crop: int) -> LatentMetric | None:
    """The metric ``kind`` as a function of two latents; None for "none".

    A ValueError if an input that the metric needs is not connected.
    """
    if kind == NONE:
        return None
    vae = images.vae
    if kind in ELEMENTWISE and vae is None:
        return lambda a, b, places: ELEMENTWISE[kind](a, b)
    needed = {"vae": vae} | ({"clip_vision": images.clip_vision} if kind == FEATURES else {})
    missing = [name for name, value in needed.items() if value is None]
    if vae is None or missing:
        raise ValueError(
            f"the metric {kind} compares images; connect {' and '.join(missing)}, or set metric to none, l1 or huber"
        )
    distance = image_distance(kind, images, vae.device)
    return CropMetric(images.decode, distance, max(1, crop // vae.spacial_compression_decode()))


def head_run(
    trainer: CasDMTrainer, theta: GuidedPrediction, images: TrainingImages, metric: str, **outputs: Any
) -> TrainingRun:
    """The TrainingRun of ``trainer``, whose frozen model θ is ``theta``.

    ``outputs``: the fields prefix, checkpoint_every and preview_every of TrainingRun.
    """

    def prepare(progress: Callable[[], None]) -> None:
        trainer.cache_predictions(lambda done, count: progress())
        if trainer.settings.cached_steps:
            theta.unload()

    return TrainingRun(
        node="TrainCasDMHead",
        loop=trainer.loop,
        output=lambda evaluation: trainer.head(evaluation, metric=metric),
        write=lambda head, prefix: save_head(*to_file(head), prefix),
        report=lambda before, after: report(trainer, before, after, metric),
        show=lambda: sheet(trainer, images),
        prepare=prepare,
        preparations=min(trainer.settings.cached_steps, trainer.settings.steps),
        **outputs,
    )


def sheet(trainer: CasDMTrainer, images: TrainingImages) -> torch.Tensor | None:
    """Contact sheet of validation images, predicted by the model, the head and the mix.

    None if latents cannot be shown as images.
    """
    rows = []
    for example in trainer.examples():
        latents = torch.stack([example.x_theta, example.x_phi, example.mixed, example.x0])
        shown = _shown(latents.to(trainer.device), images)
        if shown is None:
            return None
        rows.append((f"{example.percent:.0%} done", f"r {example.r:.2f}", shown.unbind(0)))
    return draw_examples(rows) if rows else None


@torch.no_grad()
def _shown(latents: torch.Tensor, images: TrainingImages) -> torch.Tensor | None:
    if images.vae is not None:
        return images.decode(latents).cpu()
    return None if images.model is None else preview_images(images.model, latents)
