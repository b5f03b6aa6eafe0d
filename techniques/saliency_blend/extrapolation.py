"""Predictions of an expert between its evaluations: its offset from the base is extrapolated to the current sigma."""

import math

from torch import Tensor

Pair = tuple[Tensor, Tensor]  # conditional and unconditional prediction of x0, [B, C, *S] each
Sides = tuple[Tensor, Tensor | None]  # a pair whose unconditional prediction is None if it was not evaluated


class Offsets:
    """Differences between an expert's and the base's predictions of one conditioning at the last two evaluations."""

    # Fraction of the first-order step. An offset is noisy, and a full step doubles its noise. On the demo checkpoints,
    # half a step has the highest PSNR to the blend without skipped evaluations (dev/benchmarks/fusion_fidelity.py).
    damping = 0.5

    def __init__(self) -> None:
        self._known: list[tuple[float, Tensor]] = []  # (sigma, offset [B, C, *S]), the newest last

    def __bool__(self) -> bool:
        return bool(self._known)

    def add(self, sigma: float, expert: Tensor, base: Tensor) -> None:
        """Store the offset ``expert`` - ``base`` at ``sigma``, and drop all older offsets except the last one."""
        self._known = [*(k for k in self._known[-1:] if k[0] != sigma), (sigma, expert - base)]

    def extrapolate(self, sigma: float, base: Tensor) -> Tensor:
        """The expert's prediction at ``sigma``: ``base`` plus the offset that is extrapolated from the last two.

        The extrapolation is of first order in ln sigma. With a single offset, or without damping, it is the last one.
        """
        s1, o1 = self._known[-1]
        if len(self._known) < 2 or self.damping == 0.0:
            return base + o1
        s0, o0 = self._known[0]
        steps = math.log(sigma / s1) / math.log(s1 / s0)
        # the undamped step is at most the step between the two evaluations
        t = self.damping * min(max(steps, 0.0), 1.0)
        return base + o1 + t * (o1 - o0)


class PairOffsets:
    """The ``Offsets`` of both predictions of a pair. The unconditional one may be evaluated less often."""

    def __init__(self) -> None:
        self._sides = Offsets(), Offsets()

    def __bool__(self) -> bool:
        return bool(self._sides[0])

    def add(self, sigma: float, expert: Sides, base: Sides) -> None:
        """Store the offsets at ``sigma``. Without an unconditional prediction of both, its last offset stays."""
        self._sides[0].add(sigma, expert[0], base[0])
        if expert[1] is not None and base[1] is not None:
            self._sides[1].add(sigma, expert[1], base[1])

    def extrapolate(self, sigma: float, base: Sides) -> Sides:
        """The expert's predictions at ``sigma``, the unconditional one only if ``base`` has it."""
        cond = self._sides[0].extrapolate(sigma, base[0])
        return cond, None if base[1] is None else self._sides[1].extrapolate(sigma, base[1])
