"""Batching of prompts, images, masks and token grids.

An item is one prompt with its image, mask and token grid. Each kind of input has either one element, used for every
item, or one element per item, paired in order. Every item is sampled ``times`` times; the samples of one item are
adjacent in the batch.
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
        """The batch for inputs with the sizes ``counts``, by name; error messages show underscores as spaces."""
        items = max(counts.values())
        if any(count not in (1, items) for count in counts.values()):
            listed = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
            raise ValueError(
                f"{listed} cannot be batched: each count must be 1 or {items}; connect 1 or {items} of each"
            )
        return cls(items, times)

    def __len__(self) -> int:
        return self.items * self.times

    def expand(self, x: Tensor) -> Tensor:
        """``x`` [1 or items, ...] repeated for every sample: [items * times, ...]."""
        samples = repeat(x.expand(self.items, *x.shape[1:]), "items ... -> (items times) ...", times=self.times)
        return samples.contiguous()  # safetensors cannot save expanded views


def stack_texts(*groups: Sequence[Text]) -> list[Text]:
    """Concatenate the prompts of each group. A prompt has states [1, L, C] and pooled text [1, C].

    All results have the same length: prompts are repeated up to the least common multiple of the lengths, as ComfyUI
    does. This does not change attention, because every word is repeated equally often.
    """
    length = math.lcm(*(states.shape[1] for states, _ in _flatten(groups)))
    return [
        (
            torch.cat([states.repeat(1, length // states.shape[1], 1) for states, _ in group]),
            torch.cat([pooled for _, pooled in group]),
        )
        for group in groups
    ]


def _flatten(groups: Iterable[Sequence[Text]]) -> list[Text]:
    return [text for group in groups for text in group]
