"""Saliency-aware noise blending of N models (MagicFusion, arXiv 2303.13126)."""

from typing import NamedTuple

from torch import Tensor

from . import fused_torch


class Blend(NamedTuple):
    """The blended predictions and who painted where."""

    cond: Tensor  # [B, C, H, W]
    uncond: Tensor  # [B, C, H, W]
    weights: Tensor  # hard: uint8 [B, H, W], the index of the model that owns the position; soft: float32 [N, B, H, W]
    partition: Tensor  # float32 [N, B], the log-sum-exp of every model's k Λ: not finite where a prediction is not


def saliency_blend(
    cond: list[Tensor],
    uncond: list[Tensor],
    scale: Tensor,
    strength: list[float],
    bias: list[Tensor],
    gain: list[float],
    *,
    blur: int = 4,
    shared: bool = False,
    softness: float | None = None,
) -> Blend:
    """Give every position to the model with the largest ln softmax(k Λ) + bias, Λ = Blur(mean_C |cond - uncond| scale).

    ``cond`` and ``uncond``: N predictions [B, C, H, W] each, the base first. ``scale`` [B] brings their differences to
    the paper's units (1 / σ for predictions of x0). ``strength``: k of each model. ``bias``: a tensor that broadcasts
    to [B, H, W] for each model; +inf gives the model the position, -inf bars it. ``gain``: each model's own guidance,
    u + gain (c - u) is blended in place of c; 1 keeps c exactly. ``shared`` measures every model against the base's
    uncond (the authors' code) instead of its own (the paper). ``softness``: None for the paper's hard mask, else the
    temperature of a softmax over the models. Computes in float32, returns the dtype of ``cond``.
    """
    return Blend(
        *fused_torch.saliency_blend(
            cond, uncond, scale, strength, bias, gain, blur=blur, shared=shared, softness=softness
        )
    )
