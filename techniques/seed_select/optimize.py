"""Optimises one noise by gradient descent: the gradient of the image's score flows through the sampling to the noise.

From SeedSelect (arXiv 2304.14530). Optimiser, learning rates and iteration counts are those of the authors' code
(dvirsamuel/SeedSelect, 8a1f3d4). Three things differ from it:
- the norm of the noise stays in a range that is likely for random noise (NAO, arXiv 2306.08687), while the authors do
  not constrain it;
- the best iterate is returned, while the authors return the last iterate that they score;
- an optimisation that no longer improves stops early.

A score is a loss: lower is better.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .prior import check_noise, check_width, onto_shell
from .records import Candidate, Progress, ScoreSeries, SeedResult
from .sampler import GradientCost, SeedGradients


@dataclass(frozen=True, kw_only=True)
class OptimizeSettings:
    """Settings of an optimisation; the first four defaults are the authors'.

    For NAO's initial noises the authors use 5 iterations and the learning rate 0.05.
    """

    iterations: int = 30
    learning_rate: float = 0.1
    full_rate_iterations: int = 3  # after these iterations the learning rate is divided by ten
    weight_decay: float = 0.01  # of AdamW
    shell_width: float = 3.0  # largest deviation of the norm, in standard deviations; infinity: as in the authors' code
    patience: int = 10  # stop after this many iterations without a better score; 0: never, as in the authors' code

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(
                f"iterations {self.iterations} is negative; use 0 to leave the noise unchanged (the authors use 30)"
            )
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(
                f"learning_rate {self.learning_rate:g} is not a finite number above 0; use 0.1 as the authors do"
            )
        if self.patience < 0:
            raise ValueError(f"patience {self.patience} is negative; use 0 to run all iterations")
        check_width(self.shell_width)

    def rate(self, iteration: int) -> float:
        return self.learning_rate if iteration < self.full_rate_iterations else self.learning_rate / 10

    def planned(self, cost: GradientCost) -> int:
        """Number of evaluations of one optimisation without an early stop; the last iterate needs no gradient."""
        return self.iterations * cost.with_gradient + cost.forward


class SeedOptimization:
    """One optimisation. Its attributes are valid at any time, so an interrupted optimisation also has a best result.

    ``start``: the initial noise with its label; ``gradients``: differentiable sampling and scores.
    """

    def __init__(
        self, start: Candidate, gradients: SeedGradients, settings: OptimizeSettings, cost: GradientCost | None = None
    ) -> None:
        self.start, self.noise = start, start.noise()
        check_noise(self.noise)
        self.settings, self.cost = settings, cost or GradientCost()
        self._gradients = gradients
        # for the initial noise and after each iteration: score, norm of the noise, evaluations so far
        self.scores: list[float] = []
        self.norms: list[float] = []
        self.spent: list[int] = []
        self.best: SeedResult | None = None
        self.best_iteration = 0

    @property
    def evaluations(self) -> int:
        return self.spent[-1] if self.spent else 0

    # nodes run in inference mode, and autograd cannot save inference tensors for backward
    @torch.inference_mode(False)
    @torch.enable_grad()
    def run(self, progress: Progress | None = None) -> SeedResult:
        """Optimise; returns the result of the best iterate, or of the unchanged initial noise if no iterate is better.

        Calls ``progress(done, total, score, latent)`` after each iterate. ``done`` and ``total`` are evaluations, ``score`` is
        the best score so far, and ``latent()`` returns the latent with that score. Exceptions raised by ``progress``,
        unroll() and score() end the run.
        """
        # not in float16, where the epsilon of the optimiser underflows and its first step divides by zero
        wide = torch.promote_types(self.noise.dtype, torch.float32)
        noise = self.noise.detach().to(wide, copy=True).requires_grad_(True)
        adam = torch.optim.AdamW([noise], lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay)
        for iteration in range(self.settings.iterations):
            loss = self._evaluate(noise, iteration, self.cost.with_gradient, progress)
            if self._out_of_patience(iteration):
                break
            adam.zero_grad()
            self._backward(loss, noise, iteration)
            adam.param_groups[0]["lr"] = self.settings.rate(iteration)
            adam.step()
            with torch.no_grad():
                noise.copy_(onto_shell(noise, self.settings.shell_width))
        else:
            # unlike the authors' code, also score the last iterate
            with torch.no_grad():
                self._evaluate(noise, self.settings.iterations, self.cost.forward, progress)
        assert self.best is not None  # set by the first evaluation
        return self.best

    def _out_of_patience(self, iteration: int) -> bool:
        return 0 < self.settings.patience <= iteration - self.best_iteration

    def _evaluate(self, noise: Tensor, iteration: int, cost: int, progress: Progress | None) -> Tensor:
        latents = self._gradients.unroll(noise)
        loss = self._gradients.score(latents)
        if loss.numel() != 1:
            raise ValueError(f"expected one number from score() for one noise, got {loss.numel()}; return one score")
        score = float(loss.detach())
        if not math.isfinite(score):
            smaller = f"use a smaller learning_rate than {self.settings.learning_rate:g}, or " if iteration else ""
            raise ValueError(
                f"the score of {self.start.label} is {score} {_when(iteration)}; {smaller}run the model and the VAE in a"
                " wider dtype"
            )
        self.spent.append(self.evaluations + cost)
        self.scores.append(score)
        self.norms.append(float(noise.detach().cpu().double().norm()))
        if self.best is None or score < self.best.score:
            self.best_iteration = iteration
            best_noise = self.noise if iteration == 0 else noise.detach().clone()
            latent = self._gradients.to_latent(latents[-1].detach().clone()).cpu()
            self.best = self.start.result(best_noise, latent, score)
        if progress is not None:
            best = self.best
            progress(self.evaluations, self.settings.planned(self.cost), best.score, lambda: best.latent)
        return loss.sum()

    def _backward(self, loss: Tensor, noise: Tensor, iteration: int) -> None:
        if loss.requires_grad:
            loss.backward()
        if noise.grad is None:
            raise ValueError(
                "the score has no gradient with respect to the noise; use a differentiable model, VAE and image encoder,"
                " or mode search"
            )
        if not bool(torch.isfinite(noise.grad).all()):
            raise ValueError(
                f"the gradient of {self.start.label} is not finite (NaN or infinite) {_when(iteration)}; run the model, the VAE and the image"
                " encoder in a wider dtype, or use mode search"
            )

    @property
    def label(self) -> str:
        """Label of the best iterate: only a noise that differs from the initial one is called optimised."""
        return f"{self.start.label}, optimised" if self.best_iteration else self.start.label

    def lines(self) -> list[str]:
        """Lines of the report; none before the first score."""
        if self.best is None:
            return []
        iterations, best = len(self.scores) - 1, self.best_iteration
        lines = [
            f"optimised {self.start.label}: score {self.scores[0]:.4f} to {self.best.score:.4f} in {iterations} iterations,"
            f" best after {best}; norm {self.norms[0]:.2f} to {self.norms[best]:.2f}"
        ]
        if iterations and not best:
            lines.append(
                "the optimisation found nothing better than the start, so the noise is unchanged; try another seed or more"
                " steps"
            )
        return lines

    def series(self, before: int = 0) -> ScoreSeries:
        """Line of the score curve with a point for the initial noise and for each iteration.

        ``before``: evaluations of the run before this optimisation.
        """
        return ScoreSeries(f"{self.start.label}, optimised", tuple(before + n for n in self.spent), tuple(self.scores))


def _when(iteration: int) -> str:
    return "at the start" if iteration == 0 else f"after iteration {iteration}"
