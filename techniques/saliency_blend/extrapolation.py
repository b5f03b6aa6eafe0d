"""Predictions of an expert between its evaluations: its offset from the base is extrapolated to the current sigma."""

import math

from torch import Tensor

Pair = tuple[Tensor, Tensor]  # conditional and unconditional prediction of x0, [B, C, *S] each


class Offsets:
    """Differences between an expert's and the base's predictions at the expert's last two evaluations."""

    # Fraction of the first-order step. An offset is noisy, and a full step doubles its noise. On the demo checkpoints,
    # half a step has the highest PSNR to the blend without skipped evaluations (dev/benchmarks/fusion_fidelity.py).
    damping = 0.5

    def __init__(self) -> None:
        self._known: list[tuple[float, Pair]] = []  # (sigma, offset), the newest last

    def __bool__(self) -> bool:
        return bool(self._known)

    def add(self, sigma: float, expert: Pair, base: Pair) -> None:
        """Store the offset ``expert`` - ``base`` at ``sigma``, and drop all older offsets except the last one."""
        cond, uncond = (e - b for e, b in zip(expert, base, strict=True))
        self._known = [*(k for k in self._known[-1:] if k[0] != sigma), (sigma, (cond, uncond))]

    def reuse(self, base: Pair) -> Pair:
        """The expert's predictions: ``base`` plus the last offset."""
        cond, uncond = (b + o for b, o in zip(base, self._known[-1][1], strict=True))
        return cond, uncond

    def extrapolate(self, sigma: float, base: Pair) -> Pair:
        """The expert's predictions at ``sigma``: ``base`` plus the offset that is extrapolated from the last two.

        The extrapolation is of first order in ln sigma.
        """
        if len(self._known) < 2 or self.damping == 0.0:
            return self.reuse(base)
        (s0, o0), (s1, o1) = self._known
        steps = math.log(sigma / s1) / math.log(s1 / s0)
        # the undamped step is at most the step between the two evaluations
        t = self.damping * min(max(steps, 0.0), 1.0)
        cond, uncond = (b + n + t * (n - p) for b, n, p in zip(base, o1, o0, strict=True))
        return cond, uncond
