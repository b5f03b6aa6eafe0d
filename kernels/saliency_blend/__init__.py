"""Saliency-aware noise blending of N models (MagicFusion, arXiv 2303.13126)."""

from typing import NamedTuple

from torch import Tensor

from . import fused_torch


class Blend(NamedTuple):
    """The blended predictions and who painted where. S: (H, W), or (T, H, W) for video, masked frame by frame."""

    cond: Tensor  # [B, C, *S]
    uncond: Tensor  # [B, C, *S]
    weights: Tensor  # hard: uint8 [B, *S], the index of the model that owns the position; soft: float32 [N, B, *S]
    partition: Tensor  # float32 [N, B T], the log-sum-exp of every model's k Λ: not finite where a prediction is not


def saliency_blend(
    cond: list[Tensor],
    uncond: list[Tensor],
    sigma: Tensor,
    strength: list[float],
    bias: list[float],
    region: list[Tensor | None],
    gain: list[float],
    *,
    blur: int = 4,
    shared: bool = False,
    softness: float | None = None,
) -> Blend:
    """Give every position to the model with the largest ln softmax(k Λ) + bias + region, Λ = Blur(mean_C |c - u|) / σ.

    ``cond`` and ``uncond``: N predictions of x0 [B, C, *S] each, the base first; ``sigma`` [B] brings their
    differences to the paper's units. ``strength``: k of each model. ``region``: None, or a log score that broadcasts
    to [B, *S]; 0 is neutral, +inf gives the model the position, -inf bars it. ``gain``: each model's own guidance,
    u + gain (c - u) is blended in place of c; 1 keeps c exactly. ``shared`` measures every model against the base's
    uncond (the authors' code) instead of its own (the paper). ``softness``: None for the paper's hard mask, else the
    temperature of a softmax over the models. Computes in float32, returns the dtype of ``cond``.
    """
    return Blend(
        *fused_torch.saliency_blend(
            cond, uncond, sigma, strength, bias, region, gain, blur=blur, shared=shared, softness=softness
        )
    )
