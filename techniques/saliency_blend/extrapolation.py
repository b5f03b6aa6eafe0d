"""Predictions of an expert between its evaluations: its offset from the base, extrapolated to the present sigma."""

import math

from torch import Tensor

Pair = tuple[Tensor, Tensor]  # conditional and unconditional prediction of x0, [B, C, *S] each


class Offsets:
    """The distance of one expert's predictions to the base's at its last evaluations."""

    # Share of the first-order step that is taken. An offset holds noise of its own, which a full step doubles. Of the
    # demo checkpoints' pictures (PSNR to the full fusion; dev/benchmarks/fusion_fidelity.py) half a step is nearest.
    damping = 0.5

    def __init__(self) -> None:
        self._known: list[tuple[float, Pair]] = []  # (sigma, offset), the newest last

    def __bool__(self) -> bool:
        return bool(self._known)

    def add(self, sigma: float, expert: Pair, base: Pair) -> None:
        """Keep the offset of a prediction at ``sigma``, and the one before it."""
        cond, uncond = (e - b for e, b in zip(expert, base, strict=True))
        self._known = [*(k for k in self._known[-1:] if k[0] != sigma), (sigma, (cond, uncond))]

    def reuse(self, base: Pair) -> Pair:
        """The expert's predictions with its last offset from ``base``."""
        cond, uncond = (b + o for b, o in zip(base, self._known[-1][1], strict=True))
        return cond, uncond

    def extrapolate(self, sigma: float, base: Pair) -> Pair:
        """The expert's predictions at ``sigma``: its offset extrapolated to first order in ln sigma from the last two."""
        if len(self._known) < 2 or self.damping == 0.0:
            return self.reuse(base)
        (s0, o0), (s1, o1) = self._known
        steps = math.log(sigma / s1) / math.log(s1 / s0)
        t = self.damping * min(max(steps, 0.0), 1.0)  # never farther than the two are apart
        cond, uncond = (b + n + t * (n - p) for b, n, p in zip(base, o1, o0, strict=True))
        return cond, uncond
