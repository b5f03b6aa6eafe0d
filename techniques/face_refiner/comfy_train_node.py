"""The training run of Train Face Refiner: metric, preview and saving."""

from typing import Any

import torch

from ...host.training_images import TrainingImages
from ...host.training_metrics import FEATURES, NONE, image_distance
from ...host.training_run import TrainingRun
from ...training.metrics import Distance
from .comfy_training import save, trained
from .training import paired, unpaired
from .training.base import RefinerEvaluation
from .view import PAIRED, UNPAIRED, draw_refined


def image_metric(kind: str, images: TrainingImages, device: torch.device | str) -> Distance | None:
    """The metric ``kind`` on images; None for "none". Raises a ValueError if a required input is not connected."""
    if kind == NONE:
        return None
    if kind == FEATURES and images.clip_vision is None:
        raise ValueError(
            "the metric clip_vision needs an image encoder; connect clip_vision (Load CLIP Vision), or set metric to lpips, l1 or huber"
        )
    return image_distance(kind, images, device)


def refiner_run(trainer: paired.PairedTrainer | unpaired.CycleTrainer, measure: str, **outputs: Any) -> TrainingRun:
    """The TrainingRun of ``trainer``.

    ``measure``: name of the validation distance in the report and in the file's metadata. ``outputs``: arguments of
    TrainingRun for checkpoints and previews.
    """

    def report(before: RefinerEvaluation, after: RefinerEvaluation) -> str:
        if isinstance(trainer, paired.PairedTrainer):
            return paired.report(trainer, before, after, measure)
        return unpaired.report(trainer, before, after, measure)

    return TrainingRun(
        node="TrainFaceRefiner",
        loop=trainer.loop,
        output=lambda evaluation: trained(trainer.weights(), {**trainer.facts(evaluation), "metric": measure}),
        write=save,
        report=report,
        show=lambda: draw_refined(trainer.examples(), PAIRED if trainer.data.paired else UNPAIRED),
        **outputs,
    )
