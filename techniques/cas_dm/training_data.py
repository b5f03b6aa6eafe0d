"""What a Cas-DM head learns from: latents of any sizes, noised at levels of the model's own process.

Shapes: B samples, C channels, h and w positions; video has T frames between C and h.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...training.generators import seeded_generator
from ...training.sampling import split
from .mix import alpha_bar, amplitudes, posterior_weight

FIRST_WEIGHTS, DRAWS, HELD_OUT = 10, 11, 12  # what a generator is for, in its key
LEVELS = 8  # noise levels at which evaluations use held-out pictures
ROWS_PER_LEVEL = 8
FINEST = 1e-3  # one step of the papers' process of 1000, as a share of the sampling
EDGE = 1e-6  # percents keep off 0 and 1, where the host's are infinite and zero noise


@dataclass(frozen=True)
class Process:
    """How a model's training makes x_t of x0: x_t = s x0 + n ε, as ``techniques.cas_dm.amplitudes`` has it."""

    sigma: Callable[[float], float]  # of the share of the sampling that is done, 0 < percent < 1
    flow: bool = False
    noise_scale: float = 1.0

    def sigmas(self, percent: Tensor) -> Tensor:
        """[B] of ``percent`` [B]."""
        return torch.tensor([float(self.sigma(p)) for p in percent.tolist()], dtype=torch.float32)

    def noisy(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        signal, amount = (
            part.view(-1, *[1] * (x0.ndim - 1)) for part in amplitudes(sigma, self.flow, self.noise_scale)
        )
        return signal * x0 + amount * noise

    def posterior_weight(self, percent: Tensor) -> Tensor:
        """A_t² [B], the papers' weight of the gate loss, for a process of 1000 steps."""
        after = [
            alpha_bar(*amplitudes(self.sigmas(p).double(), self.flow, self.noise_scale))
            for p in ((percent + FINEST).clamp(max=1.0), percent)
        ]
        return posterior_weight(*after).float()


class Draw(NamedTuple):
    """Noisy pictures of one size, on the CPU."""

    indices: list[int]  # of the pictures
    x0: Tensor  # [B, C, h, w] or [B, C, T, h, w]
    x: Tensor  # x_t
    sigma: Tensor  # [B]
    percent: Tensor  # [B], how much of the sampling is done there
    places: Tensor  # [B, 2] in 0..1, of the crops that a metric looks at

    def split(self, size: int) -> list["Draw"]:
        parts = zip(*(torch.split(t, size) for t in (self.x0, self.x, self.sigma, self.percent, self.places)))
        return [Draw(self.indices[k * size : (k + 1) * size], *part) for k, part in enumerate(parts)]


class Latents:
    """Pictures in the model's scale, by size; some are held out for evaluations."""

    def __init__(self, pictures: Sequence[Tensor], process: Process, validation_fraction: float = 0.1) -> None:
        """``pictures``: [C, h, w] or [C, T, h, w] each, of any sizes. ``validation_fraction``: the share that is not trained on."""
        if not pictures:
            raise ValueError("there are no latents to learn from; wire a LATENT of at least one picture")
        self.pictures, self.process = pictures, process
        self.split = split(len(pictures), validation_fraction)
        self.buckets: dict[tuple[int, ...], list[int]] = {}
        for i in self.split.trained:
            self.buckets.setdefault(tuple(pictures[i].shape), []).append(i)

    def draw(self, seed: int, step: int, count: int) -> Draw:
        """``count`` samples of one size, the levels spread evenly over the sampling; decided by the seed and the step."""
        generator = seeded_generator(seed, DRAWS, step)
        bucket = self._bucket(int(torch.randint(len(self.split.trained), (1,), generator=generator)))
        rounds = -(-count // len(bucket))
        order = torch.cat([torch.randperm(len(bucket), generator=generator) for _ in range(rounds)])[:count]
        percent = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        return self._noised([bucket[i] for i in order.tolist()], percent, generator)

    def _bucket(self, place: int) -> list[int]:
        for bucket in self.buckets.values():
            if place < len(bucket):
                return bucket
            place -= len(bucket)
        raise IndexError(place)

    def fixed(self) -> list[Draw]:
        """Draws of the held-out pictures that are the same in every run, at every level, one size each."""
        held = self.split.held
        rows: dict[tuple[int, ...], list[tuple[int, float]]] = {}
        each = min(len(held), ROWS_PER_LEVEL)
        for level in range(LEVELS):
            for k in range(each):
                index = held[(level * each + k) % len(held)]
                rows.setdefault(tuple(self.pictures[index].shape), []).append((index, (level + 0.5) / LEVELS))
        draws = []
        for k, part in enumerate(rows.values()):
            indices, percent = zip(*part)
            draws.append(self._noised(list(indices), torch.tensor(percent), seeded_generator(0, HELD_OUT, k)))
        return draws

    def _noised(self, indices: list[int], percent: Tensor, generator: torch.Generator) -> Draw:
        x0 = torch.stack([self.pictures[i] for i in indices])
        percent = percent.clamp(EDGE, 1.0 - EDGE)
        noise, sigma = torch.randn(x0.shape, generator=generator), self.process.sigmas(percent)
        places = torch.rand(len(x0), 2, generator=generator)
        return Draw(indices, x0, self.process.noisy(x0, noise, sigma), sigma, percent, places)
