"""The run of Train Cas-DM Head: its metric, and how what it learns is shown and written."""

from collections.abc import Callable
from typing import Any

import torch

from ...host.training_images import TrainingPictures, rough_pictures
from ...host.training_metrics import FEATURES, NONE, OF_NUMBERS, distance_of
from ...host.training_run import TrainingRun
from ...training.metrics import CropMetric
from .comfy_files import save_head
from .comfy_training import Guided
from .network import to_file
from .report import report
from .training import CasDMTrainer, LatentMetric
from .view import draw_examples


def latent_metric(kind: str, pictures: TrainingPictures, crop: int) -> LatentMetric | None:
    """The metric by its name, of latents; None for none. A ValueError where something for it is not wired."""
    if kind == NONE:
        return None
    vae = pictures.vae
    if kind in OF_NUMBERS and vae is None:
        return lambda a, b, places: OF_NUMBERS[kind](a, b)
    wanted = {"vae": vae} | ({"clip_vision": pictures.clip_vision} if kind == FEATURES else {})
    missing = [name for name, value in wanted.items() if value is None]
    if vae is None or missing:
        raise ValueError(
            f"the metric {kind} compares pictures and needs {' and '.join(missing)}; wire it, or set metric to none, l1"
            " or huber"
        )
    distance = distance_of(kind, pictures, vae.device)
    return CropMetric(pictures.decode, distance, max(1, crop // vae.spacial_compression_decode()))


def head_run(trainer: CasDMTrainer, theta: Guided, pictures: TrainingPictures, metric: str, **keep: Any) -> TrainingRun:
    """``trainer`` asks ``theta``. ``keep``: as TrainingRun has it, from prefix to preview_every."""

    def prepare(progress: Callable[[], None]) -> None:
        trainer.ask_beforehand(lambda done, count: progress())
        if trainer.settings.cached_steps:
            theta.unload()

    return TrainingRun(
        node="TrainCasDMHead",
        loop=trainer.loop,
        learned=lambda evaluation: trainer.head(evaluation, metric=metric),
        write=lambda head, prefix: save_head(*to_file(head), prefix),
        report=lambda before, after: report(trainer, before, after, metric),
        show=lambda: sheet(trainer, pictures),
        prepare=prepare,
        preparations=min(trainer.settings.cached_steps, trainer.settings.steps),
        **keep,
    )


def sheet(trainer: CasDMTrainer, pictures: TrainingPictures) -> torch.Tensor | None:
    """Held-out pictures as the model, the head and the mix have them; None where they cannot be shown."""
    rows = []
    for example in trainer.examples():
        latents = torch.stack([example.x_theta, example.x_phi, example.mixed, example.x0])
        shown = _shown(latents.to(trainer.device), pictures)
        if shown is None:
            return None
        rows.append((f"{example.percent:.0%} done", f"r {example.r:.2f}", shown.unbind(0)))
    return draw_examples(rows) if rows else None


@torch.no_grad()
def _shown(latents: torch.Tensor, pictures: TrainingPictures) -> torch.Tensor | None:
    if pictures.vae is not None:
        return pictures.decode(latents).cpu()
    return None if pictures.model is None else rough_pictures(pictures.model, latents)
