"""How prompts, pictures, masks and token grids of different numbers make one batch.

Each comes once, for all, or as often as the others: then they go together in their order. Each of the n items is
sampled ``times`` times; samples of one item follow each other.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor

Text = tuple[Tensor, Tensor]  # states [P, L, C] and pooled [P, C] of P prompts


@dataclass(frozen=True)
class Batch:
    items: int
    times: int

    @classmethod
    def of(cls, times: int, **counts: int) -> "Batch":
        """The batch of ``counts``, the number of each thing under its name; underscores are read as spaces."""
        items = max(counts.values())
        if any(count not in (1, items) for count in counts.values()):
            listed = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
            raise ValueError(f"{listed} make no batch: each must be 1 or {items}; wire one for all, or {items} of each")
        return cls(items, times)

    def __len__(self) -> int:
        return self.items * self.times

    def spread(self, x: Tensor) -> Tensor:
        """One of ``x`` [1 or items, ...] for each sample: [items times, ...]."""
        samples = repeat(x.expand(self.items, *x.shape[1:]), "items ... -> (items times) ...", times=self.times)
        return samples.contiguous()  # files hold no expanded views


def stack_texts(*groups: Sequence[Text]) -> list[Text]:
    """Each group of single prompts, states [1, L, C] and pooled [1, C], as one text, all of one length.

    Shorter prompts are repeated whole, as the host does: attention reads each word as often as every other, so its
    result is the same.
    """
    length = math.lcm(*(states.shape[1] for states, _ in _all(groups)))
    return [
        (
            torch.cat([states.repeat(1, length // states.shape[1], 1) for states, _ in group]),
            torch.cat([pooled for _, pooled in group]),
        )
        for group in groups
    ]


def _all(groups: Iterable[Sequence[Text]]) -> list[Text]:
    return [text for group in groups for text in group]
