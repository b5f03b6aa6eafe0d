"""MagicFusion's blend in float64 numpy: the definition with which tests compare the pack's implementations.

This module was written independently of the pack: from the paper (arXiv 2303.13126, section 3), and for the option
"shared" of ``saliency`` from the authors' code. From the predictions of all models at one x, it computes which model
generates each position.
"""

from dataclasses import dataclass

import numpy as np

CFG = 5.0
# scores that differ by less than TIE may have either order in float32; if the largest score is below 1, TIE is relative
# to it
TIE = 1e-5
FLOAT32 = np.finfo(np.float32).eps


def smooth(maps, blur):
    """Mean of ``maps`` [..., H, W] over a box of blur x blur positions, with zeros outside the map.

    An even ``blur`` makes the averaged map one position shorter along each axis, so it is stretched back bilinearly.
    An axis of one position is not averaged.
    """
    sides = [blur if n > 1 else 1 for n in maps.shape[-2:]]
    pads = [((side - 1) // 2,) * 2 for side in sides]
    padded = np.pad(maps, [(0, 0)] * (maps.ndim - 2) + pads)
    height, width = (n - side + 1 for n, side in zip(padded.shape[-2:], sides, strict=True))
    total = sum(padded[..., i : i + height, j : j + width] for i in range(sides[0]) for j in range(sides[1]))
    rows, columns = stretch(height, maps.shape[-2]), stretch(width, maps.shape[-1])
    return rows @ (total / (sides[0] * sides[1])) @ columns.T


def stretch(short, long):
    """Matrix [long, short] of the bilinear interpolation from ``short`` to ``long`` positions.

    Pixel centres are at 0.5, 1.5, 2.5, ...
    """
    if short == 1:
        return np.ones((long, 1))
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
    """One blended prediction by the definition, and bounds on its rounding errors in float32."""

    weights: np.ndarray  # [N, B, H, W]
    weight_bound: float  # bound on the error of a weight
    certain: np.ndarray  # [B, H, W]: False where scores may tie
    gap: float  # smallest difference between the two best scores; infinite for a soft mask
    guided: np.ndarray  # [B, C, H, W]: blended x0 after guidance
    bound: np.ndarray  # [B, C, H, W]: bound on the error of ``guided``
    scores: np.ndarray  # [N, B, H, W]: k · saliency − ln(mean of exp(k · saliency)), without ``extra``
    rounding: float  # bound on the error of a score in float32
    spread: np.ndarray  # [N, B]: standard deviation over the positions of score - base's score


def definition(call, pairs, *, strengths, guidance, saliency="own", blur=4, extra=None, softness=None):
    """The expected result of the blend at ``call``.

    ``pairs``: predictions (cond, uncond) of x0 of every model. ``extra`` [N, B, H, W] is added to the scores. The unit
    of ``extra`` and of ``softness`` is the standard deviation, over the positions, of score - base's score.
    """
    x, sigma = call.x.double().numpy(), call.sigma.double().numpy().reshape(-1, 1, 1, 1)
    pairs = [(c.double().numpy(), u.double().numpy()) for c, u in pairs]
    noises = [((x - c) / sigma, (x - u) / sigma) for c, u in pairs]  # ε(x|y), ε(x|∅)

    scores, largest = [], 0.0
    for (conditional, unconditional), k in zip(noises, strengths, strict=True):
        if saliency == "own":
            difference = np.abs(conditional - unconditional)
        else:
            difference = np.abs(guidance[0] * (conditional - noises[0][1]))
        logits = k * smooth(difference, blur).mean(1)
        largest = max(largest, np.abs(logits).max())
        scores.append(log_softmax(logits, (-2, -1)))
    scores = np.stack(scores)
    scores = scores + np.log(
        scores[0, 0].size
    )  # log softmax + ln(H W) = ln(exp / mean of exp); the same constant for all models
    # in float32, a score is the difference of two numbers as large as k · saliency, so its error is relative to these
    rounding, plain = 8 * FLOAT32 * max(np.abs(scores).max(), largest), scores
    unit = (scores - scores[0]).std((-2, -1))[..., None, None]  # [N, B, 1, 1]
    if extra is not None:
        scores = scores + np.where(np.isinf(extra), extra, np.where(np.isinf(extra), 0.0, extra) * unit)

    guided = np.stack([u + s * (c - u) for (c, u), s in zip(pairs, guidance, strict=True)])
    bound = np.max([16 * FLOAT32 * s * (np.abs(c) + np.abs(u)) for (c, u), s in zip(pairs, guidance)], axis=0)
    if softness is None:
        weights = (scores.argmax(0) == np.arange(len(pairs)).reshape(-1, 1, 1, 1)).astype(float)
        weight_bound = 0.0
        ordered = np.sort(scores, axis=0)
        gap = ordered[-1] - ordered[-2]
        certain = gap > TIE * min(1.0, np.abs(plain).max())
    else:
        temperature = softness * np.where(unit[1:].mean(0) > 0, unit[1:].mean(0), 1.0)
        weights = np.exp(log_softmax(scores / temperature, 0))
        weight_bound = rounding / temperature.min() + FLOAT32
        certain, gap = np.ones(scores.shape[1:], bool), np.array(np.inf)
    bound = bound + weight_bound * np.abs(guided).sum(0)
    blended = (guided * weights[:, :, None]).sum(0)
    spread = unit[..., 0, 0]
    return Expected(weights, weight_bound, certain, float(gap.min()), blended, bound, plain, rounding, spread)
