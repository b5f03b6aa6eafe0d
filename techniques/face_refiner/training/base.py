"""What paired and unpaired training of a face refiner share: networks, crops, learning rate, what is handed out.

All networks of a step get their gradients from the weights before it, then all are updated at once by one Adam. What is
handed out is the generator, with the running statistics of its batch norms.

Shapes: B samples, S the side of a crop. Networks see pictures [B, 3, S, S] in -1..1, everything else in 0..1.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ....training.generators import seeded_generator
from ....training.loop import Evaluation, Training, TrainingLoop, autocast
from ....training.report_lines import TRAINED_ON
from ..networks.layers import ImageGenerator
from ..networks.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from .generators import initialise, with_trained_batch_norms
from .pairs import Batch, FaceData

FIRST_WEIGHTS, DROPOUT = 20, 23  # what a generator is for, in its key, beside those of pairs
GENERATOR, BACK, DISCRIMINATORS = 0, 1, 2  # whose first weights
BETAS, GAN_BETAS = (0.9, 0.999), (0.5, 0.999)  # Adam's; the second of the GANs that we follow
RATE = 2e-4  # of CycleGAN and pix2pix


def falling_rate(settings: Training, step: int) -> float:
    """The learning rate of a step: in the second half it falls linearly to 0."""
    falling = settings.steps - settings.steps // 2
    return settings.learning_rate * (1.0 - max(0, step + 1 - settings.steps // 2) / (falling + 1))


@dataclass(frozen=True)
class RefinerEvaluation(Evaluation):
    """How a refiner does on held-out pictures."""

    source: dict[str, float] = field(default_factory=dict)  # distances of the pictures as they are to the target
    refined: dict[str, float] = field(default_factory=dict)  # and refined


class RefinerTrainer(ABC):
    """What ``loop`` trains a refiner by, paired or not; ``weights()`` is what it has learned so far."""

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
        """``generator``: where to begin, changed; ``resumed``: it has been trained, by ``first_step`` steps of this kind.
        ``others``: networks trained along.
        """
        if data.crop < generator.least or data.crop % generator.multiple:
            raise ValueError(
                f"{generator.config} takes pictures of at least {generator.least} pixels in multiples of"
                f" {generator.multiple}, and crop is {data.crop}; use such a crop, or another architecture"
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
        """As TrainingLoop has it."""

    @abstractmethod
    def _measure(self) -> RefinerEvaluation:
        """As TrainingLoop has it."""

    def _batches(self, step: int) -> Iterator[Batch]:
        for batch in self.draw(step).split(self.settings.batch_size):
            yield Batch(*(t.to(self.device) for t in batch))

    def draw(self, step: int) -> Batch:
        """The crops of a step of this run."""
        return self.data.draw(self.settings.seed, self.loop.first_step + step, self.settings.samples)

    def _draws(self, step: int, number: int, count: int) -> list[torch.Generator]:
        """What dropout draws from: a generator for each sample, however they are batched."""
        key, first = (self.settings.seed, DROPOUT, self.loop.first_step + step), number * self.settings.batch_size
        return [seeded_generator(*key, first + i) for i in range(count)]

    def apply(self, network: nn.Module, x: Tensor, draws: Sequence[torch.Generator] | None = None) -> Tensor:
        """``network(x)`` in the run's precision; float32."""
        with autocast(self.device, self.precision):
            return network(x, draws).float()

    def refine(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] of 0..1 as the refiner that is handed out makes them, on the run's device."""
        found = []
        with self.loop.averaged():
            for rows in pictures.split(self.settings.batch_size):
                rows = rows.to(self.device)
                x = 2.0 * rows - 1.0
                found.append(rows + 0.5 * (self.apply(self.generator, x) - x))
        return torch.cat(found)

    def examples(self, count: int = 4) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Some held-out pictures [3, S, S] of 0..1: source, refined, and a target."""
        source, target = self.data.fixed()
        refined = self.refine(source[:count]).cpu().clamp(0.0, 1.0)
        return list(zip(source[:count], refined, target[:count]))

    def weights(self) -> dict[str, Tensor]:
        """The state dict of the refiner as it is now, on the CPU."""
        found = dict(self.generator.named_buffers())
        found |= {name: value for (name, _), value in zip(self.generator.named_parameters(), self.loop.average)}
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in found.items()}

    def facts(self, evaluation: RefinerEvaluation | None = None) -> dict[str, str]:
        """What is worth knowing of the refiner, for its file."""
        settings = self.settings
        kept = {name: str(getattr(settings, name)) for name in ("batch_size", "learning_rate", "seed")}
        kept |= {
            "size": str(self.data.crop),
            "steps": str(self.loop.steps),
            "pairing": "paired" if self.data.paired else "unpaired",
            "data": str(self.data),
        }
        return kept if evaluation is None else kept | {"held_out_loss": f"{evaluation.loss:.6g}"}


def new_discriminator(seed: int, channels: int, number: int, crop: int) -> PatchDiscriminator:
    """An untrained discriminator; instance norm, since batches are small."""
    if crop < PatchDiscriminator.least:
        raise ValueError(
            f"crop {crop} is less than {PatchDiscriminator.least}, the least that a discriminator takes; use a larger one"
        )
    network = PatchDiscriminator(PatchDiscriminatorConfig(channels=channels))
    return initialise(network, seeded_generator(seed, FIRST_WEIGHTS, DISCRIMINATORS + number))


def networks_and_data(trainer: RefinerTrainer) -> str:
    """A line of a report."""
    weights = sum(p.numel() for p in trainer.loop.parameters)
    return f"{trainer.generator.config}: {weights} weights; {trainer.data}, crops of {trainer.data.crop}"


def validation_images(trainer: RefinerTrainer) -> str:
    """What a report calls the pictures of its evaluations."""
    if not trainer.data.unseen:
        return TRAINED_ON
    numbers = " and ".join(str(len(side.split.held)) for side in trainer.data.sides[: 1 if trainer.data.paired else 2])
    return f"{numbers} held-out {'pairs' if trainer.data.paired else 'pictures'}"
