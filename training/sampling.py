"""Which samples a training holds out, and the order in which it takes the others."""

import math
from dataclasses import dataclass

import torch

from .generators import seeded_generator

MOST_HELD_OUT = 32  # samples


@dataclass(frozen=True)
class Split:
    """The numbers of the samples: those trained on, and those that evaluations use.

    ``unseen``: none of ``held`` is trained on. Otherwise the share was less than one sample, and ``held`` are trained ones.
    """

    trained: list[int]
    held: list[int]
    unseen: bool


def split(count: int, validation_fraction: float) -> Split:
    """Hold out a share ``validation_fraction`` of ``count`` samples, evenly spread, at most MOST_HELD_OUT."""
    if not 0.0 <= validation_fraction < 1.0:
        raise ValueError(
            f"validation_fraction {validation_fraction:g} is not a share of 0 to 1; use 0.1 for every tenth picture"
        )
    number = min(MOST_HELD_OUT, math.floor(validation_fraction * count))
    held = [int((i + 0.5) * count / number) for i in range(number)]
    trained = sorted({*range(count)} - {*held})
    return Split(trained, held or trained[:MOST_HELD_OUT], bool(held))


def shuffled(count: int, position: int, *key: int) -> int:
    """The sample at a position of the run: all ``count`` once, in a new order by ``key``, before any comes again."""
    epoch, place = divmod(position, count)
    return int(torch.randperm(count, generator=seeded_generator(*key, epoch))[place])
