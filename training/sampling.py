"""Validation split of a training, and the random order of its training samples."""

import math
from dataclasses import dataclass

import torch

from .generators import seeded_generator

MAX_VALIDATION = 32  # samples


@dataclass(frozen=True)
class Split:
    """Indices of the samples for training and for evaluations.

    ``unseen``: whether ``validation`` is disjoint from ``trained``. If the validation fraction is less than one sample,
    ``validation`` holds training samples.
    """

    trained: list[int]
    validation: list[int]
    unseen: bool


def split(count: int, validation_fraction: float) -> Split:
    """Split ``count`` samples into training and validation samples.

    The validation samples are evenly spread over all samples. Their number is ``validation_fraction`` times ``count``,
    rounded down, and at most MAX_VALIDATION.
    """
    if not 0.0 <= validation_fraction < 1.0:
        raise ValueError(
            f"validation_fraction {validation_fraction:g} must be at least 0 and below 1; use 0.1 for every tenth image"
        )
    number = min(MAX_VALIDATION, math.floor(validation_fraction * count))
    validation = [int((i + 0.5) * count / number) for i in range(number)]
    trained = sorted({*range(count)} - {*validation})
    return Split(trained, validation or trained[:MAX_VALIDATION], bool(validation))


def shuffled(count: int, position: int, *key: int) -> int:
    """Index of the sample at ``position`` of the run. Each epoch is a new permutation, seeded by ``key``."""
    epoch, place = divmod(position, count)
    return int(torch.randperm(count, generator=seeded_generator(*key, epoch))[place])
