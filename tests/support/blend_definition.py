"""MagicFusion's definition in float64 numpy, written from the paper and the authors' code and from nothing of the pack.

Given what each model predicts at one x, it says which model paints where (arXiv 2303.13126, section 3; `shared`: the
authors' code).
"""

from dataclasses import dataclass

import numpy as np

CFG = 5.0
TIE = 1e-5  # scores nearer than this may fall to either side in float32
FLOAT32 = np.finfo(np.float32).eps


def smooth(maps, blur):
    """Mean over a blur x blur box, zeros outside; an even box shortens the map, which is stretched back bilinearly."""
    pad = (blur - 1) // 2
    padded = np.pad(maps, [(0, 0)] * (maps.ndim - 2) + [(pad, pad)] * 2)
    height, width = (n - blur + 1 for n in padded.shape[-2:])
    total = sum(padded[..., i : i + height, j : j + width] for i in range(blur) for j in range(blur))
    rows, columns = stretch(height, maps.shape[-2]), stretch(width, maps.shape[-1])
    return rows @ (total / blur**2) @ columns.T


def stretch(short, long):
    """Bilinear interpolation from ``short`` to ``long`` positions, pixel centres at halves, as a matrix."""
    matrix = np.zeros((long, short))
    for i in range(long):
        at = np.clip((i + 0.5) * short / long - 0.5, 0, short - 1)
        low = min(int(at), short - 2)
        matrix[i, low : low + 2] = 1 - (at - low), at - low
    return matrix


def log_softmax(logits, axes):
    top = logits.max(axes, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axes, keepdims=True))


@dataclass
class Expected:
    """One prediction by the definition, and what float32 may make of it."""

    weights: np.ndarray  # [N, B, H, W]
    weight_bound: float
    certain: np.ndarray  # [B, H, W]: no tie
    gap: float  # between the two best scores where they are nearest; infinite with a soft mask
    guided: np.ndarray  # [B, C, H, W]: x0 after guidance
    bound: np.ndarray  # [B, C, H, W]


def definition(call, pairs, *, strengths, guidance, saliency="own", blur=4, extra=None, softness=None):
    """What the sampler should have got at ``call``.

    ``pairs``: (cond, uncond) predictions of x0 of every model. ``extra`` [N, B, H, W] is added to the scores.
    """
    x, sigma = call.x.double().numpy(), call.sigma.double().numpy().reshape(-1, 1, 1, 1)
    pairs = [(c.double().numpy(), u.double().numpy()) for c, u in pairs]
    noises = [((x - c) / sigma, (x - u) / sigma) for c, u in pairs]  # ε(x|y), ε(x|∅)

    scores = []
    for (conditional, unconditional), k in zip(noises, strengths, strict=True):
        if saliency == "own":
            difference = np.abs(conditional - unconditional)
        else:
            difference = np.abs(guidance[0] * (conditional - noises[0][1]))
        scores.append(log_softmax(k * smooth(difference, blur).mean(1), (-2, -1)))
    scores = np.stack(scores)
    rounding = 8 * FLOAT32 * np.abs(scores).max()
    if extra is not None:
        scores = scores + extra

    guided = np.stack([u + s * (c - u) for (c, u), s in zip(pairs, guidance, strict=True)])
    bound = np.max([16 * FLOAT32 * s * (np.abs(c) + np.abs(u)) for (c, u), s in zip(pairs, guidance)], axis=0)
    if softness is None:
        weights = (scores.argmax(0) == np.arange(len(pairs)).reshape(-1, 1, 1, 1)).astype(float)
        weight_bound = 0.0
        ordered = np.sort(scores, axis=0)
        gap = ordered[-1] - ordered[-2]
        certain = gap > TIE
    else:
        weights = np.exp(log_softmax(scores / softness, 0))
        weight_bound = rounding / softness + FLOAT32
        certain, gap = np.ones(scores.shape[1:], bool), np.array(np.inf)
    bound = bound + weight_bound * np.abs(guided).sum(0)
    return Expected(weights, weight_bound, certain, float(gap.min()), (guided * weights[:, :, None]).sum(0), bound)
