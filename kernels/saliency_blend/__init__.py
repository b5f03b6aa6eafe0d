"""Saliency-aware noise blending of N models (MagicFusion, arXiv 2303.13126)."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import fused_torch

try:
    from . import fused
except Exception as error:  # torch for Windows, macOS or CPU has no Triton, or Triton is broken
    fused, _missing = None, f"Triton cannot be imported ({error}); install triton, on Windows triton-windows"

_logger = logging.getLogger("comfyui-chorus")
_given_up = False  # whether Triton has failed or is missing on this machine, and a warning was logged


class Blend(NamedTuple):
    """Blended predictions and the mask. S: (H, W), or (T, H, W) for video, where each frame has its own mask.

    ``saliency_blend`` defines the symbols.
    """

    cond: Tensor  # [B, C, *S]
    uncond: Tensor  # [B, C, *S]
    weights: Tensor  # hard: uint8 [B, *S], index of the model that generates the position; soft: float32 [N, B, *S]
    partition: Tensor  # float32 [N, B T], ln of the mean exp(k Λ); non-finite if the model's prediction is
    logits: Tensor  # float32 [N, B, *S], k Λ; the next prediction can use it as ``memory``
    spread: Tensor  # float32 [N, B T], unit of bias, ln(region) and softness; 0 for the base

    def lead(self) -> Tensor:
        """See ``lead``."""
        return lead(self.logits, self.partition, self.spread)


def lead(logits: Tensor, partition: Tensor, spread: Tensor) -> Tensor:
    """Lead of each expert over the base in units of the spread: [N - 1, B, *S].

    It is the difference of their ln softmax(k Λ), divided by the spread, and 0 where the spread is 0. ``logits``
    [N, B, *S], ``partition`` and ``spread`` [N, B T] are those of one ``Blend``, or of several that are concatenated
    along B.
    """
    samples = (len(logits) - 1, logits.shape[1], *logits.shape[2:-2], 1, 1)
    offset, unit = (t.view(samples) for t in (partition[1:] - partition[:1], spread[1:]))
    return (logits[1:] - logits[:1] - offset) / torch.where(unit > 0.0, unit, float("inf"))


def _nvidia(like: Tensor) -> bool:
    return like.device.type == "cuda" and torch.version.hip is None


def _obstacle(like: Tensor, models: int) -> str | None:
    """The reason why Triton cannot blend ``models`` predictions like ``like``; None if it can."""
    if fused is None:
        return _missing
    if models > fused.MAX_MODELS:
        return f"it supports at most {fused.MAX_MODELS} models, got {models} models"
    if fused.INTERPRETED:
        return None
    if not _nvidia(like):
        return f"it needs tensors on an NVIDIA GPU, got tensors on {like.device}"
    if torch.cuda.get_device_properties(like.device).major < 8:
        return f"it needs compute capability 8.0 or more, which {torch.cuda.get_device_name(like.device)} does not have"
    return None


def _give_up(reason: str) -> None:
    """Use torch from now on, and log a warning once."""
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
    quota: Sequence[Tensor | int | None] | None = None,
    memory: Sequence[Tensor | None] | None = None,
    momentum: float = 0.0,
    blur: int = 4,
    shared: bool = False,
    softness: float | None = None,
    backend: str = "auto",
) -> Blend:
    """Give every position to the model with the largest s + d (bias + region), s = ln softmax(k Λ).

    Λ = Blur(mean_C |c - u|) / σ is the saliency (MagicFusion, arXiv 2303.13126, section 3) of a model with the
    predictions c and u (``cond`` and ``uncond``) and the strength k. s is the score. The lead of an expert is its score
    minus the base's. The spread d is the standard deviation of the lead over the positions, for each expert, sample and
    frame. Everything that is added to a score is in units of d, because the differences of scores range from 0.01 to 10
    over models, latent spaces, steps and prompts. If d is 0, as for the same model twice, nothing is added to the
    score, and nothing is divided by d. A d within the rounding error of k Λ counts as 0.

    The score is computed as k Λ minus the ln of the mean exp(k Λ). It differs from ln softmax by the same number for
    all models, so that the winner is the same. At the large initial σ of models with zero terminal SNR, scores differ
    by only 1e-5. ln softmax lies near -8, where float32 cannot represent such differences.

    Args (lists have one entry per model, the base first):
        cond, uncond: N predictions of x0, [B, C, *S] each.
        sigma: [B]; the differences of x0 predictions are divided by it, which makes them differences of noise
            predictions as in the paper.
        strength: k of each model.
        bias: bias of each model, 0 for the base.
        region: None, as for the base, or ln of a mask that broadcasts to [B, *S]. 0 has no effect, +inf forces the
            model at the position, -inf excludes the model.
        gain: guidance of each model relative to the sampler's: u + gain (c - u) is blended in place of c. 1 keeps c
            exactly.
        quota: None, or the number of positions that the model gets in each sample and frame, an int or int64 [B T]. The
            model gets the positions with the largest lead + d region, among the positions that its region allows and
            that no earlier expert has taken. Of equal values, the first in memory is taken. In a soft mask, the quota
            is the number of positions where the model has a larger weight than the base.
        memory: None, or ``logits`` of an earlier prediction of the model; k Λ becomes
            ``momentum`` memory + (1 - ``momentum``) k Λ.
        momentum: see ``memory``.
        blur: side of the smoothing box in positions.
        shared: compare every model with the base's uncond (the authors' code) instead of its own (the paper).
        softness: None for the paper's hard mask. Otherwise the weights are the softmax of the scores divided by
            ``softness`` times the mean d of the experts.
        backend: "auto" uses Triton for up to 8 models on an NVIDIA GPU of compute capability 8.0 or more, and torch
            otherwise. If Triton fails, torch is used from then on, and one warning is logged. "triton" and "torch"
            force one implementation, for tests and bug reports.

    Computes in float32 and returns the dtype of ``cond``. With gradients, torch runs for every ``backend``, because the
    Triton kernel has no backward pass. In code compiled by torch.compile, an error of Triton does not lead to a
    fallback to torch.

    Errors: ValueError for an unknown ``backend``, or for a bias, region or quota of the base; RuntimeError if
    ``backend`` is "triton" and Triton cannot run.
    """
    like, models = cond[0], len(cond)
    if bias[0] != 0.0 or region[0] is not None or (quota is not None and quota[0] is not None):
        raise ValueError("the base cannot have a bias, region or quota; set them for the experts only")
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend '{backend}' is unknown; use one of auto, triton, torch")
    obstacle = _obstacle(like, models)
    if backend == "triton" and obstacle:
        raise RuntimeError(f"the Triton kernel cannot run: {obstacle}; use backend auto or torch")
    arguments = (cond, uncond, sigma, strength, bias, region, gain)
    options = {
        "quota": quota,
        "memory": memory,
        "momentum": momentum,
        "blur": blur,
        "shared": shared,
        "softness": softness,
    }
    if torch.is_grad_enabled() and any(p.requires_grad for p in (*cond, *uncond)):
        return Blend(*fused_torch.saliency_blend(*arguments, **options))
    wanted = backend == "triton" or (backend == "auto" and not _given_up and not obstacle and _nvidia(like))
    if fused is not None and wanted:
        try:
            return Blend(*fused.saliency_blend(*arguments, **options))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # such as a missing C compiler, or a GPU or driver that Triton does not support
            if backend == "triton":
                raise
            # if torch fails, too, its error is raised, because Triton is then not the cause
            blend = Blend(*fused_torch.saliency_blend(*arguments, **options))
            _give_up(f"Triton failed ({type(error).__name__}: {error})")
            return blend
    if backend == "auto" and not _given_up and fused is None and _nvidia(like):
        _give_up(_missing)
    return Blend(*fused_torch.saliency_blend(*arguments, **options))
