"""Comparison of a network's derivative with finite differences along one direction.

An operation without a derivative (a fused kernel, a quantised layer, a patch) can make a gradient wrong without an error.
Let f be a function with Jacobian J at x, d a direction, h a step and w a cotangent. Autograd computes (J^T w) . d, and
finite differences compute w . (f(x + h d) - f(x - h d)) / 2h. The two numbers are equal up to the error of the
differences. The cotangent w is the difference f(x + h d) - f(x - h d) itself, without its part along d. There are two
reasons:
- the second number is then a sum of squares, so it cannot vanish by chance;
- the part along d contains the identity from x to x0, which dominates at low noise and always has a correct derivative.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The step |h d| relative to |x|, by dtype. Measured on small UNets (eps, v, flow), Flux, blends and the demo
# checkpoint at the first step of a run. "Rounding" and "curvature" (of the network) are errors of the finite
# differences, in % of the difference. "Ratio" is autograd's number divided by that of finite differences.
#   float32,  step 1e-3: curvature 0.1 to 0.8 %; ratio 0.9995 to 1.0005
#             step 1e-2: masks of blends flip
#   float16,  step 1e-2: rounding 8 to 19 %
#             step 3e-2: rounding and curvature 3 to 8 %; ratio 0.997 to 1.000
#             step 1e-1: curvature 7 to 16 %
#   bfloat16, step 3e-2: rounding 21 to 48 %
#             step 1e-1: rounding and curvature 10 to 22 %; ratio 1.004 to 1.019
STEP = 1e-3
STEPS = {torch.float16: 3e-2, torch.bfloat16: 1e-1}
# Largest accepted |ratio - 1| without roughness. For comparison: if attention has no derivative, the ratio is 0.14 to
# 0.92 on these models, in all dtypes.
TOLERANCE = 0.01
# The roughness q is the norm of the second difference relative to that of the first. Rounding changes the ratio by
# q^2 / 3. A mask of a blend that flips in a few places changes the ratio by q^2 plus a correlation term. If q is above
# UNDECIDED, rounding or flips dominate, as in hard blends in 16 bits, and the gradient is not checked.
ROUGHNESS_FACTOR, UNDECIDED = 3.0, 0.25


@dataclass(frozen=True)
class Comparison:
    """Settings for comparing the derivative of one network."""

    dtypes: Sequence[torch.dtype | None]  # dtypes in which the network computes
    causes: Callable[[], str]  # returns the likely causes of a wrong derivative, with the remedy

    def step(self, x: Tensor) -> float:
        """Step |h d| for the input ``x``."""
        return max((STEPS.get(dtype, STEP) for dtype in self.dtypes if dtype is not None), default=STEP) * float(
            x.norm()
        )


def direction_like(x: Tensor) -> Tensor:
    """A random direction of norm 1, the same one for all x of one shape."""
    values = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return (values / values.norm()).to(x)


def disagreement(
    value: Tensor, up: Tensor, down: Tensor, direction: Tensor, step: float, derivative: Callable[[Tensor], Tensor]
) -> str:
    """Text for an error message if ``derivative`` disagrees with finite differences.

    Empty if they agree, or if rounding or flips of masks dominate (see UNDECIDED).

    ``value``, ``up``, ``down``: values of the function at x, x + ``step`` ``direction`` and x - ``step`` ``direction``,
    each of the shape of x. ``derivative``: the vector-Jacobian product at x, as a function of the cotangent.
    """
    value, up, down, direction = (v.float() for v in (value, up, down, direction))
    slope = (up - down) / (2 * step)
    cotangent = slope - (slope * direction).sum() * direction
    norm = float(cotangent.norm())
    if not 0.0 < norm < float("inf"):
        return ""
    roughness = float((up - 2 * value + down).norm()) / (2 * step * norm)
    if not roughness <= UNDECIDED:
        return ""
    cotangent = cotangent * (cotangent.numel() ** 0.5 / norm)  # scaled to mean square 1: no underflow in float16
    found = float((derivative(cotangent).float() * direction).sum())
    expected = float((cotangent * slope).sum())
    tolerance = TOLERANCE + ROUGHNESS_FACTOR * roughness**2
    if abs(found / expected - 1) <= tolerance:
        return ""
    return (
        f"along a random direction it is {found:.4g} by autograd and {expected:.4g} by finite differences"
        f" ({100 * abs(found / expected - 1):.2g} % off; rounding explains up to {100 * tolerance:.2g} %)"
    )
