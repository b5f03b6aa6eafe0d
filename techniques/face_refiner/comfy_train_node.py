"""The run of Train Face Refiner: what its metric is made of, and what of the training is shown and kept."""

from pathlib import Path

from torch import Tensor

from ...host.training_images import TrainingPictures
from ...host.training_metrics import FEATURES, NONE, distance_of
from ...host.training_node import TrainingNodeRun
from ...training.metrics import Distance
from .comfy_model import FaceRefinerModel
from .comfy_training import save, trained
from .networks.image_generators import load_generator
from .training import paired as face_refiner
from .training import unpaired
from .training.base import Examined, RefinerTrainer
from .view import PAIRED, UNPAIRED, draw_refined


def picture_metric(kind: str, pictures: TrainingPictures, device) -> Distance | None:
    """The metric by its name, of pictures; None for none. A ValueError where something for it is not wired."""
    if kind == NONE:
        return None
    if kind == FEATURES and pictures.clip_vision is None:
        raise ValueError(
            "the metric clip_vision compares features of an encoder and needs clip_vision; wire it (Load CLIP Vision),"
            " or set metric to lpips, l1 or huber"
        )
    return distance_of(kind, pictures, device)


class RefinerRun(TrainingNodeRun):
    node = "TrainFaceRefiner"
    trainer: RefinerTrainer

    def __init__(self, trainer: RefinerTrainer, measure: str, *keep, **details: str):
        """``measure``: what the report calls the distance by which it tells whether it learned; ``details`` go into the
        file. ``keep``: as TrainingNodeRun has it, from prefix to preview_every.
        """
        self.measure, self.details = measure, details
        super().__init__(trainer, *keep)

    def _report(self, before: Examined, after: Examined) -> str:
        report = face_refiner.report if self.trainer.data.paired else unpaired.report
        return report(self.trainer, before, after, self.measure)

    def _learned(self, examined: Examined | None) -> FaceRefinerModel:
        details = {**self.trainer.facts(examined), **self.details}
        return trained(self.trainer.weights(), details, load_generator)

    def _write(self, learned: FaceRefinerModel, prefix: str) -> Path:
        return save(learned, prefix)

    def sheet(self) -> Tensor:
        """Held-out pictures, refined."""
        return draw_refined(self.trainer.examples(), PAIRED if self.trainer.data.paired else UNPAIRED)
