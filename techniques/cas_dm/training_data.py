"""Training data of a Cas-DM head: latents of any sizes, noised by the model's own process.

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

NO_LATENTS = "samples hold no latents; load images and encode them with the VAE of this model"
FIRST_WEIGHTS, TRAINING, VALIDATION = 10, 11, 12  # purposes of random generators, part of their keys
LEVELS = 8  # noise levels at which validation images are evaluated
ROWS_PER_LEVEL = 8  # maximum number of validation images evaluated at each noise level
STEP_FRACTION = 1e-3  # one of the papers' 1000 steps, as a fraction of the sampling
PERCENT_MARGIN = 1e-6  # smallest distance of percent from 0 and 1, where ComfyUI's sigma is infinite and 0


@dataclass(frozen=True)
class Process:
    """The noising process of a model: x_t = s x0 + n ε, with s and n from ``mix.amplitudes``."""

    sigma: Callable[[float], float]  # function of percent, the fraction of the sampling that is done, 0 < percent < 1
    flow: bool = False
    noise_scale: float = 1.0

    def sigmas(self, percent: Tensor) -> Tensor:
        """Sigmas [B] at ``percent`` [B]."""
        return torch.tensor([float(self.sigma(p)) for p in percent.tolist()], dtype=torch.float32)

    def noisy(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x_t of ``x0`` and ``noise`` ε at ``sigma`` [B]."""
        signal, amount = (
            part.view(-1, *[1] * (x0.ndim - 1)) for part in amplitudes(sigma, self.flow, self.noise_scale)
        )
        return signal * x0 + amount * noise

    def posterior_weight(self, percent: Tensor) -> Tensor:
        """A_t² [B], the papers' weight of the gate loss in a schedule of 1000 steps."""
        bars = [
            alpha_bar(*amplitudes(self.sigmas(p).double(), self.flow, self.noise_scale))
            for p in ((percent + STEP_FRACTION).clamp(max=1.0), percent)
        ]
        return posterior_weight(*bars).float()


class NoisyBatch(NamedTuple):
    """Noisy images of one size, on the CPU."""

    indices: list[int]  # of the images
    x0: Tensor  # [B, C, h, w] or [B, C, T, h, w]
    x: Tensor  # x_t
    sigma: Tensor  # [B]
    percent: Tensor  # [B], fraction of the sampling that is done at sigma
    positions: Tensor  # [B, 2] in 0..1, positions of the crops that a metric compares

    def split(self, size: int) -> list["NoisyBatch"]:
        parts = zip(*(torch.split(t, size) for t in (self.x0, self.x, self.sigma, self.percent, self.positions)))
        return [NoisyBatch(self.indices[k * size : (k + 1) * size], *part) for k, part in enumerate(parts)]


class Latents:
    """Latents in the model's scale, grouped by size and split into training and validation."""

    def __init__(self, images: Sequence[Tensor], process: Process, validation_fraction: float = 0.1) -> None:
        """``images``: latents [C, h, w] or [C, T, h, w] of any sizes.

        ``validation_fraction``: fraction of the images that is used for validation only.
        """
        if not images:
            raise ValueError(NO_LATENTS)
        self.images, self.process = images, process
        self.split = split(len(images), validation_fraction)
        self.buckets: dict[tuple[int, ...], list[int]] = {}  # indices of the training images by shape
        for i in self.split.trained:
            self.buckets.setdefault(tuple(images[i].shape), []).append(i)

    def noisy_batch(self, seed: int, step: int, count: int) -> NoisyBatch:
        """``count`` samples of one size at evenly spread noise levels. They depend only on the seed and the step."""
        generator = seeded_generator(seed, TRAINING, step)
        bucket = self._bucket(int(torch.randint(len(self.split.trained), (1,), generator=generator)))
        rounds = -(-count // len(bucket))
        order = torch.cat([torch.randperm(len(bucket), generator=generator) for _ in range(rounds)])[:count]
        percent = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        return self._noised([bucket[i] for i in order.tolist()], percent, generator)

    def _bucket(self, position: int) -> list[int]:
        """The bucket of the training image at ``position``, counted over all buckets."""
        for bucket in self.buckets.values():
            if position < len(bucket):
                return bucket
            position -= len(bucket)
        raise IndexError(position)

    def validation_batches(self) -> list[NoisyBatch]:
        """The validation images at every noise level, in batches of one image size. They are the same in every run."""
        held = self.split.validation
        rows: dict[tuple[int, ...], list[tuple[int, float]]] = {}
        each = min(len(held), ROWS_PER_LEVEL)
        for level in range(LEVELS):
            for k in range(each):
                index = held[(level * each + k) % len(held)]
                rows.setdefault(tuple(self.images[index].shape), []).append((index, (level + 0.5) / LEVELS))
        batches = []
        for k, part in enumerate(rows.values()):
            indices, percent = zip(*part)
            batches.append(self._noised(list(indices), torch.tensor(percent), seeded_generator(0, VALIDATION, k)))
        return batches

    def _noised(self, indices: list[int], percent: Tensor, generator: torch.Generator) -> NoisyBatch:
        x0 = torch.stack([self.images[i] for i in indices])
        percent = percent.clamp(PERCENT_MARGIN, 1.0 - PERCENT_MARGIN)
        noise, sigma = torch.randn(x0.shape, generator=generator), self.process.sigmas(percent)
        positions = torch.rand(len(x0), 2, generator=generator)
        return NoisyBatch(indices, x0, self.process.noisy(x0, noise, sigma), sigma, percent, positions)
