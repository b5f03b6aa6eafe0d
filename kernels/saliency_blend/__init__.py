"""Saliency-aware noise blending of N models (MagicFusion, arXiv 2303.13126)."""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from . import fused_torch

try:
    from . import fused
except Exception as error:  # absent from the Windows, macOS and CPU builds of torch, or broken: the pack works without
    fused, _missing = None, f"Triton cannot be imported ({error}); install triton, on Windows triton-windows"

_logger = logging.getLogger("comfyui-chorus")
_given_up = False  # Triton has failed on this machine, or is missing and that was said


class Blend(NamedTuple):
    """The blended predictions and who painted where. S: (H, W), or (T, H, W) for video, masked frame by frame."""

    cond: Tensor  # [B, C, *S]
    uncond: Tensor  # [B, C, *S]
    weights: Tensor  # hard: uint8 [B, *S], the index of the model that owns the position; soft: float32 [N, B, *S]
    partition: Tensor  # float32 [N, B T], the log-sum-exp of every model's k Λ: not finite where a prediction is not


def _nvidia(like: Tensor) -> bool:
    return like.device.type == "cuda" and torch.version.hip is None


def _obstacle(like: Tensor, models: int) -> str | None:
    """Why Triton cannot blend ``models`` predictions like ``like``; None where it can."""
    if fused is None:
        return _missing
    if models > fused.MAX_MODELS:
        return f"{models} models are more than its {fused.MAX_MODELS}"
    if fused.INTERPRETED:
        return None
    if not _nvidia(like):
        return f"it needs tensors on an NVIDIA GPU, these are on {like.device}"
    if torch.cuda.get_device_properties(like.device).major < 8:
        return f"it needs compute capability 8.0, {torch.cuda.get_device_name(like.device)} has less"
    return None


def _give_up(reason: str) -> None:
    """Leave Triton alone from now on, and say so once."""
    global _given_up
    _given_up = True
    _logger.warning("saliency_blend runs in plain torch, which is slower: %s", reason)


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
    backend: str = "auto",
) -> Blend:
    """Give every position to the model with the largest ln softmax(k Λ) + bias + region, Λ = Blur(mean_C |c - u|) / σ.

    ``cond`` and ``uncond``: N predictions of x0 [B, C, *S] each, the base first; ``sigma`` [B] brings their
    differences to the paper's units. ``strength``: k of each model. ``region``: None, or a log score that broadcasts
    to [B, *S]; 0 is neutral, +inf gives the model the position, -inf bars it. ``gain``: each model's own guidance,
    u + gain (c - u) is blended in place of c; 1 keeps c exactly. ``shared`` measures every model against the base's
    uncond (the authors' code) instead of its own (the paper). ``softness``: None for the paper's hard mask, else the
    temperature of a softmax over the models. Computes in float32, returns the dtype of ``cond``.

    ``backend``: "auto" takes Triton for up to 8 models on an NVIDIA GPU of compute capability 8.0 or more and plain
    torch elsewhere; where Triton fails, torch takes over for good and the log says once why. "triton" and "torch"
    force one, for tests and bug reports. Compiled by torch.compile, the Triton path does not fall back. Where gradients
    are asked for, torch runs whatever the backend: the Triton kernel has none.
    """
    like, models = cond[0], len(cond)
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend '{backend}' is not known; it is auto, triton or torch")
    obstacle = _obstacle(like, models)
    if backend == "triton" and obstacle:
        raise RuntimeError(f"the Triton kernel cannot run: {obstacle}; use backend auto or torch")
    arguments = (cond, uncond, sigma, strength, bias, region, gain)
    options = {"blur": blur, "shared": shared, "softness": softness}
    if torch.is_grad_enabled() and any(p.requires_grad for p in (*cond, *uncond)):
        return Blend(*fused_torch.saliency_blend(*arguments, **options))
    wanted = backend == "triton" or (backend == "auto" and not _given_up and not obstacle and _nvidia(like))
    if fused is not None and wanted:
        try:
            return Blend(*fused.saliency_blend(*arguments, **options))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no C compiler, a GPU or driver that this Triton does not know
            if backend == "triton":
                raise
            blend = Blend(*fused_torch.saliency_blend(*arguments, **options))  # what fails here too is not Triton's
            _give_up(f"Triton failed ({type(error).__name__}: {error})")
            return blend
    if backend == "auto" and not _given_up and fused is None and _nvidia(like):
        _give_up(_missing)
    return Blend(*fused_torch.saliency_blend(*arguments, **options))
