"""Blends a batch whose samples do not have the same models, because an expert is skipped in some of them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.saliency_blend import Blend, saliency_blend


def blend_by_rows(
    skipped: Sequence[frozenset[int]],
    cond: list[Tensor],
    uncond: list[Tensor],
    sigma: Tensor,
    strength: list[float],
    bias: list[float],
    region: list[Tensor | None],
    gain: list[float],
    *,
    quota: Sequence[Tensor | int | None] | None,
    memory: Sequence[Tensor | None] | None,
    **options: Any,
) -> Blend:
    """The result of ``saliency_blend``, computed for each sample without the models that are skipped in this sample.

    ``skipped``: for each model, the samples in which it is skipped; empty for the base. Samples with the same models
    are blended together. In the result the weights, logits, partition and spread of a skipped model are 0.
    """
    if not any(skipped):
        arguments = (cond, uncond, sigma, strength, bias, region, gain)
        return saliency_blend(*arguments, quota=quota, memory=memory, **options)
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in range(len(cond[0])):
        models = tuple(i for i, rows in enumerate(skipped) if row not in rows)
        groups.setdefault(models, []).append(row)
    parts = []
    for models, rows in groups.items():
        pick = partial(_picked, models, rows, len(cond[0]))
        blend = saliency_blend(
            pick(cond),
            pick(uncond),
            _rows(sigma, rows, len(cond[0])),
            pick(strength),
            pick(bias),
            pick(region),
            pick(gain),
            quota=None if quota is None else pick(quota),
            memory=None if memory is None else pick(memory),
            **options,
        )
        parts.append((models, rows, blend))
    return _merged(parts, cond[0], len(cond))


def _picked(models: Sequence[int], rows: list[int], samples: int, values: Sequence[Any]) -> list[Any]:
    """The ``values`` of the given ``models``; of a tensor, only the given ``rows`` of the batch."""
    return [_rows(values[i], rows, samples) if isinstance(values[i], Tensor) else values[i] for i in models]


def _rows(values: Tensor, rows: list[int], samples: int) -> Tensor:
    """The ``rows`` of ``values`` [B, ...] or [B T]."""
    if len(rows) == samples or len(values) == 1:
        return values
    each = values.unflatten(0, (samples, -1)).unbind(0)  # indexing with ``rows`` would copy it to the GPU and wait
    return torch.cat([each[row] for row in rows])


def _merged(parts: list[tuple[tuple[int, ...], list[int], Blend]], like: Tensor, models: int) -> Blend:
    """The blend of a batch, merged from ``parts`` of (models, rows, blend). ``like``: a prediction [B, C, *S]."""
    first = parts[0][2]
    samples, frames = len(like), first.spread.shape[1] // len(parts[0][1])
    cond, uncond = first.cond.new_empty(like.shape), first.uncond.new_empty(like.shape)
    logits = first.logits.new_zeros((models, samples, *like.shape[2:]))
    partition, spread = (first.spread.new_zeros((models, samples, frames)) for _ in range(2))
    hard = first.weights.dtype == torch.uint8
    weights = first.weights.new_zeros((samples, *like.shape[2:]) if hard else logits.shape)
    for present, rows, blend in parts:
        for place, row in enumerate(rows):
            cond[row], uncond[row] = blend.cond[place], blend.uncond[place]
            frame = slice(place * frames, (place + 1) * frames)
            for slot, model in enumerate(present):
                logits[model, row] = blend.logits[slot, place]
                partition[model, row], spread[model, row] = blend.partition[slot, frame], blend.spread[slot, frame]
                if hard:
                    weights[row].masked_fill_(blend.weights[place] == slot, model)
                else:
                    weights[model, row] = blend.weights[slot, place]
    return Blend(cond, uncond, weights, partition.flatten(1), logits, spread.flatten(1))
