"""Cases in which the kernels of the blend are compared with an exact result, and the comparison.

The tests and ``bench gpu`` use them. Needs only torch, because pytest and numpy may be missing where ``bench gpu`` runs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.saliency_blend.reference import fold_frames

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16


class Case(NamedTuple):
    """Predictions and options of a blend. ``quick``: it also runs in the quick tests and in ``bench gpu --smoke``."""

    models: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    options: dict  # those that are missing have the values of DEFAULTS, or the kernel's default
    quick: bool = False


DEFAULTS = {"blur": 4, "shared": False, "softness": None}  # the implementations have no defaults for these
# the quick ones are hard, soft with shared saliency, and soft with frames
CASES = [
    Case(2, (2, 4, 16, 16), FLOAT16, {}, quick=True),
    Case(2, (1, 16, 33, 31), FLOAT32, {"shared": True}),
    Case(3, (3, 4, 9, 20), FLOAT32, {"softness": 1.0}),
    Case(4, (1, 4, 7, 50), FLOAT16, {"softness": 0.05, "shared": True}, quick=True),
    Case(8, (1, 1, 12, 17), FLOAT32, {}),
    Case(5, (2, 1, 6, 5), FLOAT16, {"softness": 0.5}),
    Case(3, (2, 4, 3, 9, 8), FLOAT32, {}),
    Case(2, (1, 4, 2, 8, 9), FLOAT16, {"softness": 1.0}, quick=True),
    Case(2, (2, 4, 1, 70), FLOAT32, {}),
    Case(3, (2, 4, 24, 20), BFLOAT16, {}),
    Case(3, (2, 4, 24, 20), BFLOAT16, {"softness": 1.0}),
]


def case_id(case):
    options = "".join(f"-{name}" for name in case.options)
    return f"{case.models}-{'x'.join(map(str, case.shape))}-{str(case.dtype)[6:]}{options}"


def random_predictions(models, shape, dtype, device):
    """(cond, uncond) of every model and σ [B]. They are generated on the CPU, so every device gets equal values."""
    uncond = [torch.randn(shape) for _ in range(models)]
    cond = [u + (1 + 0.2 * i) * torch.randn(shape) for i, u in enumerate(uncond)]
    cond, uncond = ([t.to(device, dtype) for t in side] for side in (cond, uncond))
    return cond, uncond, torch.linspace(0.5, 3.0, shape[0]).to(device)


def regions(models, shape, device):
    """Regions of every shape that broadcasts to [B, *S]; the base's is None."""
    batch, _, *axes = shape
    shapes = [(batch, *axes), axes, (1, *axes), (), (batch, *[1] * len(axes)), (axes[-1],), (axes[-2], 1)]
    return [None, *(0.05 * torch.rand(s).to(device) for s in shapes[: models - 1])]


def settings(models, shape, device):
    """Strengths, biases, regions and gains that differ from model to model, as arguments of ``saliency_blend``."""
    return {
        "strength": [0.5 + 0.1 * n for n in range(models)],
        "bias": [-0.01 * n for n in range(models)],
        "region": regions(models, shape, device),
        "gain": [1.0, 0.5, 2.0, 1.0, 1.5, 1.0, 0.0, 3.0][:models],
    }


class Exact(NamedTuple):
    """The exact result of a blend in float64 on the CPU, and bounds on the rounding of float32.

    N models; S samples, which are the frames of videos.
    """

    weights: Tensor  # [N, S, H, W]
    scores: Tensor  # [N, S, H, W]: k Λ - ln(mean of exp(k Λ))
    spread: Tensor  # [N, S]
    certain: Tensor  # [S, H, W]: False where scores may tie in float32
    weight_bound: float  # bound on the error of a weight: 0 for a hard mask
    rounding: float  # bound on the error of a score


def errors(out, exact: Exact, cond, uncond, gain) -> dict[str, tuple[float, float]]:
    """{part of the result: (largest error, its bound)} of a ``Blend`` of ``cond`` and ``uncond``.

    An error within its bound is due to rounding. The error is NaN if the result is.
    """
    models, shape = len(cond), cond[0].shape
    frames = [torch.stack([fold_frames(t).double().cpu() for t in side]) for side in (cond, uncond)]  # [N, S, C, H, W]
    hard = out.weights.dtype == torch.uint8
    weights = torch.stack([out.weights == n for n in range(models)]) if hard else out.weights
    weights = weights.double().cpu().reshape(models, -1, *shape[-2:])
    scores = out.logits.double().cpu().reshape(exact.scores.shape) - out.partition.double().cpu()[..., None, None]
    found = {
        "weights": (_largest((weights - exact.weights)[:, exact.certain]), exact.weight_bound),
        "scores": (_largest(scores - exact.scores), exact.rounding),
        "spread": (_largest(out.spread.double().cpu() - exact.spread), 2 * exact.rounding),
    }
    c, u = frames
    scale = max(gain) * (c.abs() + u.abs()).amax(0)
    bound = (4 * torch.finfo(cond[0].dtype).eps + 3 * exact.weight_bound) * scale
    guided = u + torch.tensor(gain, dtype=torch.float64).reshape(-1, 1, 1, 1, 1) * (c - u)
    for name, got, each in (("cond", out.cond, guided), ("uncond", out.uncond, u)):
        error = fold_frames(got).double().cpu() - (each * exact.weights.unsqueeze(2)).sum(0)
        found[name] = (_largest((error / bound).movedim(1, 0)[:, exact.certain]), 1.0)
    return found


def _largest(error: Tensor) -> float:
    return float(error.abs().max())
