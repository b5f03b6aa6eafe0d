"""What paired and unpaired training of a face refiner share: networks, crops, learning rate, what is handed out.

All networks of a step get their gradients from the weights before it, then all are updated at once by one Adam. What is
handed out is the generator, with the running statistics of its batch norms.

Shapes: B samples, S the side of a crop. Networks see pictures [B, 3, S, S] in -1..1, everything else in 0..1.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....training.generators import seeded_generator
from ....training.loop import AveragingTrainer, Training
from ....training.report_lines import TRAINED_ON
from ..networks.layers import ImageGenerator
from ..networks.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from .generators import initialise, with_trained_batch_norms
from .pairs import Batch, FaceData

FIRST_WEIGHTS, DROPOUT = 20, 23  # what a stream of random numbers is for, beside those of face_pairs
GENERATOR, BACK, DISCRIMINATORS = 0, 1, 2  # whose first weights
BETAS, GAN_BETAS = (0.9, 0.999), (0.5, 0.999)  # Adam's; the second of the GANs that we follow


@dataclass(frozen=True, kw_only=True)
class RefinerTraining(Training):
    """How to train, whatever the pairing."""

    usual_rate: ClassVar[str] = "2e-4"

    steps: int = 2000
    batch_size: int = 4
    learning_rate: float = 2e-4  # of CycleGAN and pix2pix

    def check_weights(self, *names: str) -> None:
        """Of parts of the loss: 0 or more."""
        for name in names:
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name):g} is not 0 or more; 0 switches it off")

    def rate(self, step: int) -> float:
        """In the second half on its way to 0."""
        falling = self.steps - self.steps // 2
        return self.learning_rate * (1.0 - max(0, step + 1 - self.steps // 2) / (falling + 1))


@dataclass(frozen=True)
class Examined:
    """How a refiner does on held-out pictures."""

    loss: float  # by which it is told whether it learned
    source: dict[str, float] = field(default_factory=dict)  # distances of the pictures as they are to the target
    refined: dict[str, float] = field(default_factory=dict)  # and refined


class RefinerTrainer(AveragingTrainer):
    """One run; ``weights()`` is what it has learned so far."""

    betas = GAN_BETAS
    settings: RefinerTraining

    def __init__(
        self,
        generator: ImageGenerator,
        data: FaceData,
        settings: RefinerTraining,
        others: Sequence[nn.Module] = (),
        *,
        first_step: int = 0,
        resumed: bool = False,
        device: torch.device | str = "cpu",
        precision: torch.dtype = torch.float32,
        recording: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        """``generator``: where to begin, changed; ``resumed``: it has been trained, by ``first_step`` steps of this kind.
        ``others``: networks trained along.
        """
        if data.crop < generator.least or data.crop % generator.multiple:
            raise ValueError(
                f"{generator.config} takes pictures of at least {generator.least} pixels in multiples of"
                f" {generator.multiple}, and crop is {data.crop}; use such a crop, or another architecture"
            )
        self.data = data
        self.generator, *self.others = networks = [
            with_trained_batch_norms(network).to(device, memory_format=torch.channels_last)
            for network in (generator, *others)
        ]
        weights = [p for network in networks for p in network.parameters()]
        optimizer = torch.optim.Adam(weights, lr=settings.learning_rate, betas=self.betas)
        own, buffers = list(self.generator.parameters()), list(self.generator.buffers())
        run = dict(device=device, precision=precision, recording=recording)
        super().__init__(settings, own, optimizer, first_step, buffers, **run)
        self.resumed = resumed or self.resumed

    def _batches(self, step: int) -> Iterator[Batch]:
        for batch in self.draw(step).split(self.settings.batch_size):
            yield Batch(*(t.to(self.device) for t in batch))

    def draw(self, step: int) -> Batch:
        """The crops of a step of this run."""
        return self.data.draw(self.settings.seed, self.first_step + step, self.settings.samples)

    def _draws(self, step: int, number: int, count: int) -> list[torch.Generator]:
        """What dropout draws from: a generator for each sample, however they are batched."""
        first = number * self.settings.batch_size
        return [seeded_generator(self.settings.seed, DROPOUT, self.first_step + step, first + i) for i in range(count)]

    def apply(self, network: nn.Module, x: Tensor, draws: Sequence[torch.Generator] | None = None) -> Tensor:
        """``network(x)`` in the run's precision; float32."""
        with self._autocast():
            return network(x, draws).float()

    def refine(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] of 0..1 as the refiner that is handed out makes them, on the run's device."""
        found = []
        with self._averaged():
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
        found |= {name: value for (name, _), value in zip(self.generator.named_parameters(), self.average)}
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in found.items()}

    def facts(self, examined: Examined | None = None) -> dict[str, str]:
        """What is worth knowing of the refiner, for its file."""
        settings = self.settings
        kept = {name: str(getattr(settings, name)) for name in ("batch_size", "learning_rate", "seed")}
        kept |= {
            "size": str(self.data.crop),
            "steps": str(self.steps),
            "pairing": "paired" if self.data.paired else "unpaired",
            "data": str(self.data),
        }
        return kept if examined is None else kept | {"held_out_loss": f"{examined.loss:.6g}"}


def new_discriminator(settings: RefinerTraining, channels: int, number: int, crop: int) -> PatchDiscriminator:
    """An untrained patch GAN; instance norm, since batches are small."""
    if crop < PatchDiscriminator.least:
        raise ValueError(
            f"crop {crop} is less than {PatchDiscriminator.least}, the least that a discriminator takes; use a larger one"
        )
    return initialise(
        PatchDiscriminator(PatchDiscriminatorConfig(channels=channels)),
        seeded_generator(settings.seed, FIRST_WEIGHTS, DISCRIMINATORS + number),
    )


def networks_and_data(trainer: RefinerTrainer) -> str:
    """A line of a report."""
    weights = sum(p.numel() for p in trainer.parameters)
    return f"{trainer.generator.config}: {weights} weights; {trainer.data}, crops of {trainer.data.crop}"


def held_out(trainer: RefinerTrainer) -> str:
    """What a report calls the pictures that are looked at before and after."""
    if not trainer.data.unseen:
        return TRAINED_ON
    numbers = " and ".join(str(len(side.held)) for side in trainer.data.sides[: 1 if trainer.data.paired else 2])
    return f"{numbers} held-out {'pairs' if trainer.data.paired else 'pictures'}"
