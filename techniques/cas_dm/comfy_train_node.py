"""The run of Train Cas-DM Head: what its metric is made of, and what of the training is shown and kept."""

from pathlib import Path

import torch

from ...host.training_images import TrainingPictures, rough_pictures
from ...host.training_metrics import FEATURES, NONE, OF_NUMBERS, distance_of
from ...host.training_node import TrainingNodeRun
from ...training.metrics import CropMetric
from .comfy_files import save_head
from .network import Head, to_file
from .report import report
from .training import CasDMTrainer, Examined
from .view import draw_examples


def latent_metric(kind: str, pictures: TrainingPictures, crop: int):
    """The metric by its name, of latents; None for none. A ValueError where something for it is not wired."""
    if kind == NONE:
        return None
    if kind in OF_NUMBERS and pictures.vae is None:
        return lambda a, b, places: OF_NUMBERS[kind](a, b)
    wanted = {"vae": pictures.vae} | ({"clip_vision": pictures.clip_vision} if kind == FEATURES else {})
    if missing := [name for name, value in wanted.items() if value is None]:
        raise ValueError(
            f"the metric {kind} compares pictures and needs {' and '.join(missing)}; wire it, or set metric to none, l1"
            " or huber"
        )
    distance = distance_of(kind, pictures, pictures.vae.device)
    return CropMetric(pictures.decode, distance, max(1, crop // pictures.vae.spacial_compression_decode()))


class HeadRun(TrainingNodeRun):
    node = "TrainCasDMHead"
    trainer: CasDMTrainer

    def __init__(self, trainer: CasDMTrainer, pictures: TrainingPictures, metric: str, *keep):
        """The trainer asks a ``Guided``. ``keep``: as TrainingNodeRun has it, from prefix to preview_every."""
        self.pictures, self.metric = pictures, metric
        super().__init__(trainer, *keep, beforehand=min(trainer.settings.cached_steps, trainer.settings.steps))

    def _before(self) -> None:
        self.trainer.ask_beforehand(lambda done, count: self.run.progress())
        if self.trainer.settings.cached_steps:
            self.trainer.x0_theta.unload()

    def _report(self, before: Examined, after: Examined) -> str:
        return report(self.trainer, before, after, self.metric)

    def _learned(self, examined: Examined | None) -> Head:
        return self.trainer.head(examined, metric=self.metric)

    def _write(self, learned: Head, prefix: str) -> Path:
        return save_head(*to_file(learned), prefix)

    def sheet(self) -> torch.Tensor | None:
        """Held-out pictures as the model, the head and the mix have them; None where they cannot be shown."""
        rows = []
        for example in self.trainer.examples():
            shown = self._shown(torch.stack([example.x_theta, example.x_phi, example.mixed, example.x0]))
            if shown is None:
                return None
            rows.append((f"{example.percent:.0%} done", f"r {example.r:.2f}", shown.unbind(0)))
        return draw_examples(rows) if rows else None

    @torch.no_grad()
    def _shown(self, latents: torch.Tensor) -> torch.Tensor | None:
        if self.pictures.vae is None:
            return rough_pictures(self.pictures.model, latents)
        return self.pictures.decode(latents.to(self.trainer.device)).cpu()
