"""Base of paired and unpaired training of face refiners: networks, batches, learning rate, evaluation, result.

In each step the gradients of all networks are computed first; then one Adam optimizer updates all networks. The result
is the EMA weights of the generator, with the running statistics of its batch norms.

Shapes: B samples, S the side of a crop. Networks take images [B, 3, S, S] in -1..1; all other images are in 0..1.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ....training.generators import seeded_generator
from ....training.loop import Evaluation, Training, TrainingLoop, autocast
from ....training.report_lines import TRAINING_IMAGES
from ..networks.layers import ImageGenerator
from ..networks.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from .generators import initialise, with_trained_batch_norms
from .pairs import Batch, FaceData

FIRST_WEIGHTS, DROPOUT = 20, 23  # parts of the keys that seed random generators; see also pairs.py
GENERATOR, BACK, DISCRIMINATORS = 0, 1, 2  # parts of those keys: the network to initialise
BETAS, GAN_BETAS = (0.9, 0.999), (0.5, 0.999)  # of Adam; GAN_BETAS as in CycleGAN and pix2pix
RATE = 2e-4  # learning rate of CycleGAN and pix2pix


def falling_rate(settings: Training, step: int) -> float:
    """The learning rate of a step: constant in the first half of the steps, then falling linearly to 0."""
    falling = settings.steps - settings.steps // 2
    return settings.learning_rate * (1.0 - max(0, step + 1 - settings.steps // 2) / (falling + 1))


@dataclass(frozen=True)
class RefinerEvaluation(Evaluation):
    """Distances to the target on validation images."""

    source: dict[str, float] = field(default_factory=dict)  # of the source images, by metric
    refined: dict[str, float] = field(default_factory=dict)  # of the refined images, by metric


class RefinerTrainer(ABC):
    """Trains a refiner through ``loop``; ``weights()`` returns its current EMA weights."""

    def __init__(
        self,
        generator: ImageGenerator,
        data: FaceData,
        settings: Training,
        others: Sequence[nn.Module] = (),
        *,
        betas: tuple[float, float] = GAN_BETAS,
        first_step: int = 0,
        resumed: bool = False,
        device: torch.device | str = "cpu",
        precision: torch.dtype = torch.float32,
        recording: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        """``generator``: the network to train, which is changed in place. ``others``: further networks, needed only in
        training. ``resumed``: whether the generator was trained before. ``first_step``: steps for which this pack
        trained it before.
        """
        if data.crop < generator.min_side or data.crop % generator.multiple:
            raise ValueError(
                f"{generator.config} takes images of at least {generator.min_side} pixels in multiples of"
                f" {generator.multiple}, and crop is {data.crop}; set crop accordingly, or use another architecture"
            )
        self.data, self.settings, self.device, self.precision = data, settings, torch.device(device), precision
        self.generator, self.others = generator, list(others)
        networks = [generator, *others]
        for network in networks:
            with_trained_batch_norms(network)
            network.to(device, memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]  # torch's types lack it
        weights = [p for network in networks for p in network.parameters()]
        optimizer = torch.optim.Adam(weights, lr=settings.learning_rate, betas=betas)
        self.loop = TrainingLoop(
            settings=settings,
            optimizer=optimizer,
            parameters=list(self.generator.parameters()),
            buffers=list(self.generator.buffers()),
            batches=self._batches,
            backward=self._backward,
            measure=self._measure,
            recording=recording,
            first_step=first_step,
            resumed=resumed,
        )

    @abstractmethod
    def _backward(self, step: int, number: int, batch: Batch) -> dict[str, Tensor]:
        """See TrainingLoop."""

    @abstractmethod
    def _measure(self) -> RefinerEvaluation:
        """See TrainingLoop."""

    def _batches(self, step: int) -> Iterator[Batch]:
        for batch in self.training_batch(step).split(self.settings.batch_size):
            yield Batch(*(t.to(self.device) for t in batch))

    def training_batch(self, step: int) -> Batch:
        """The crops for a step of this run."""
        return self.data.training_batch(self.settings.seed, self.loop.first_step + step, self.settings.samples)

    def _generators(self, step: int, number: int, count: int) -> list[torch.Generator]:
        """Random generators of dropout, one per sample, independent of the batch size."""
        key, first = (self.settings.seed, DROPOUT, self.loop.first_step + step), number * self.settings.batch_size
        return [seeded_generator(*key, first + i) for i in range(count)]

    def apply(self, network: nn.Module, x: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """``network(x)`` in the run's precision, returned in float32."""
        with autocast(self.device, self.precision):
            return network(x, generators).float()

    def refine(self, images: Tensor) -> Tensor:
        """``images`` [B, 3, S, S] in 0..1 refined with the EMA weights, on the run's device."""
        result = []
        with self.loop.averaged():
            for rows in images.split(self.settings.batch_size):
                rows = rows.to(self.device)
                x = 2.0 * rows - 1.0
                result.append(rows + 0.5 * (self.apply(self.generator, x) - x))
        return torch.cat(result)

    def examples(self, count: int = 4) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Validation images [3, S, S] in 0..1: source, refined and target."""
        source, target = self.data.validation_batch()
        refined = self.refine(source[:count]).cpu().clamp(0.0, 1.0)
        return list(zip(source[:count], refined, target[:count]))

    def weights(self) -> dict[str, Tensor]:
        """The state dict of the refiner with the current EMA weights, on the CPU."""
        result = dict(self.generator.named_buffers())
        result |= {name: value for (name, _), value in zip(self.generator.named_parameters(), self.loop.average)}
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in result.items()}

    def facts(self, evaluation: RefinerEvaluation | None = None) -> dict[str, str]:
        """Metadata for the file of the refiner."""
        settings = self.settings
        facts = {name: str(getattr(settings, name)) for name in ("batch_size", "learning_rate", "seed")}
        facts |= {
            "size": str(self.data.crop),
            "steps": str(self.loop.steps),
            "pairing": "paired" if self.data.paired else "unpaired",
            "data": str(self.data),
        }
        return facts if evaluation is None else facts | {"held_out_loss": f"{evaluation.loss:.6g}"}


def new_discriminator(seed: int, channels: int, number: int, crop: int) -> PatchDiscriminator:
    """An untrained discriminator. It has instance norms, since batches are small."""
    if crop < PatchDiscriminator.min_side:
        raise ValueError(
            f"crop {crop} is less than {PatchDiscriminator.min_side}, the minimum of the discriminator; use a larger crop"
        )
    network = PatchDiscriminator(PatchDiscriminatorConfig(channels=channels))
    return initialise(network, seeded_generator(seed, FIRST_WEIGHTS, DISCRIMINATORS + number))


def networks_and_data(trainer: RefinerTrainer) -> str:
    """The line of a report about the network and the data."""
    weights = sum(p.numel() for p in trainer.loop.parameters)
    return f"{trainer.generator.config}: {weights} weights; {trainer.data}, crops of {trainer.data.crop}"


def validation_images(trainer: RefinerTrainer) -> str:
    """Text for reports: the number of validation images, or TRAINING_IMAGES if there are too few images."""
    if not trainer.data.unseen:
        return TRAINING_IMAGES
    numbers = " and ".join(
        str(len(side.split.validation)) for side in trainer.data.sides[: 1 if trainer.data.paired else 2]
    )
    return f"{numbers} validation {'pairs' if trainer.data.paired else 'images'}"
