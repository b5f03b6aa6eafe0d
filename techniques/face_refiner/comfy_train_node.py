"""The run of Train Face Refiner: its metric, and how what it learns is shown and written."""

from typing import Any

import torch

from ...host.training_images import TrainingPictures
from ...host.training_metrics import FEATURES, NONE, distance_of
from ...host.training_run import TrainingRun
from ...training.metrics import Distance
from .comfy_training import save, trained
from .training import paired, unpaired
from .training.base import RefinerEvaluation
from .view import PAIRED, UNPAIRED, draw_refined


def picture_metric(kind: str, pictures: TrainingPictures, device: torch.device | str) -> Distance | None:
    """The metric by its name, of pictures; None for none. A ValueError where something for it is not wired."""
    if kind == NONE:
        return None
    if kind == FEATURES and pictures.clip_vision is None:
        raise ValueError(
            "the metric clip_vision compares features of an encoder and needs clip_vision; wire it (Load CLIP Vision),"
            " or set metric to lpips, l1 or huber"
        )
    return distance_of(kind, pictures, device)


def refiner_run(trainer: paired.PairedTrainer | unpaired.CycleTrainer, measure: str, **keep: Any) -> TrainingRun:
    """``measure``: what the report and the file call the distance by which it is told whether it learned. ``keep``: as
    TrainingRun has it, from prefix to preview_every.
    """

    def report(before: RefinerEvaluation, after: RefinerEvaluation) -> str:
        if isinstance(trainer, paired.PairedTrainer):
            return paired.report(trainer, before, after, measure)
        return unpaired.report(trainer, before, after, measure)

    return TrainingRun(
        node="TrainFaceRefiner",
        loop=trainer.loop,
        learned=lambda evaluation: trained(trainer.weights(), {**trainer.facts(evaluation), "metric": measure}),
        write=save,
        report=report,
        show=lambda: draw_refined(trainer.examples(), PAIRED if trainer.data.paired else UNPAIRED),
        **keep,
    )
