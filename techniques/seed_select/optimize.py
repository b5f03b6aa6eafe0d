"""Optimise one noise by the gradient of its picture's score through the whole sampling.

SeedSelect (arXiv 2304.14530); optimiser, rates and counts are those of the authors' code (dvirsamuel/SeedSelect,
8a1f3d4). Beyond it: the norm is held where noise is likely (NAO, arXiv 2306.08687; the authors' seeds drift freely),
the best iterate is kept (they show the last picture whose score they know), and optimisation ends when nothing is gained.

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
    """The defaults are the authors'; with NAO's starts they use 5 iterations and a learning rate of 0.05."""

    iterations: int = 30
    learning_rate: float = 0.1
    full_rate_iterations: int = 3  # afterwards the rate is divided by ten
    weight_decay: float = 0.01  # AdamW's
    shell_width: float = 3.0  # of the norm guard, in standard deviations; infinity is off, as the authors have it
    patience: int = 10  # iterations without a new best that end the run; 0 is off, as the authors have it

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations {self.iterations} is negative; use 0 to keep the noise, the authors use 30")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate {self.learning_rate:g} is not above 0; the authors use 0.1")
        if self.patience < 0:
            raise ValueError(f"patience {self.patience} is negative; use 0 to run all iterations")
        check_width(self.shell_width)

    def rate(self, iteration: int) -> float:
        return self.learning_rate if iteration < self.full_rate_iterations else self.learning_rate / 10

    def planned(self, cost: GradientCost) -> int:
        """Evaluations of one optimisation if no patience ends it early: the last iterate needs no gradient."""
        return self.iterations * cost.with_gradient + cost.forward


class SeedOptimization:
    """One optimisation. What it knows is in its attributes at any time, so that an interrupted one has its best too.

    ``start`` has the noise and its names; ``gradients`` gives its picture and the score of it.
    """

    def __init__(
        self, start: Candidate, gradients: SeedGradients, settings: OptimizeSettings, cost: GradientCost | None = None
    ) -> None:
        self.start, self.noise = start, start.noise()
        check_noise(self.noise)
        self.settings, self.cost = settings, cost or GradientCost()
        self._gradients = gradients
        self.scores: list[float] = []  # of the start and after each iteration
        self.norms: list[float] = []
        self.spent: list[int] = []
        self.best: SeedResult | None = None
        self.best_iteration = 0

    @property
    def evaluations(self) -> int:
        return self.spent[-1] if self.spent else 0

    # nodes run in inference mode, whose tensors autograd cannot save
    @torch.inference_mode(False)
    @torch.enable_grad()
    def run(self, progress: Progress | None = None) -> SeedResult:
        """The best iterate; the start itself, bit for bit, where no iteration is better.

        ``progress(done, total, score, picture)`` after each evaluation of a noise: evaluations, the best score so far,
        and what gives its latent. What it raises ends the run, as does what unroll() and score() raise.
        """
        noise = self.noise.detach().clone().requires_grad_(True)
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
            # the authors never look at what their last step gave
            with torch.no_grad():
                self._evaluate(noise, self.settings.iterations, self.cost.forward, progress)
        assert self.best is not None  # the first evaluation made it
        return self.best

    def _out_of_patience(self, iteration: int) -> bool:
        return 0 < self.settings.patience <= iteration - self.best_iteration

    def _evaluate(self, noise: Tensor, iteration: int, cost: int, progress: Progress | None) -> Tensor:
        latents = self._gradients.unroll(noise)
        loss = self._gradients.score(latents)
        if loss.numel() != 1:
            raise ValueError(f"score() gave {loss.numel()} numbers for one noise; it must give one")
        score = float(loss.detach())
        if not math.isfinite(score):
            smaller = f"use a smaller learning_rate than {self.settings.learning_rate:g}, or " if iteration else ""
            raise ValueError(
                f"the score of {self.start.label} is {score} {_when(iteration)}; {smaller}run the model and the VAE in a wider"
                " dtype"
            )
        self.spent.append(self.evaluations + cost)
        self.scores.append(score)
        self.norms.append(float(noise.detach().cpu().double().norm()))
        if self.best is None or score < self.best.score:
            self.best_iteration = iteration
            kept = self.noise if iteration == 0 else noise.detach().clone()
            latent = self._gradients.to_latent(latents[-1].detach().clone()).cpu()
            self.best = self.start.result(kept, latent, score)
        if progress is not None:
            best = self.best
            progress(self.evaluations, self.settings.planned(self.cost), best.score, lambda: best.latent)
        return loss.sum()

    def _backward(self, loss: Tensor, noise: Tensor, iteration: int) -> None:
        if loss.requires_grad:
            loss.backward()
        if noise.grad is None:
            raise ValueError(
                "the score has no gradient to the noise; use a model, VAE and encoder that are open to gradients, or"
                " mode search"
            )
        if not bool(torch.isfinite(noise.grad).all()):
            raise ValueError(
                f"the gradient of {self.start.label} is not finite {_when(iteration)}; run the model, VAE and encoder in a"
                " wider dtype, or use mode search"
            )

    def series(self, before: int = 0) -> ScoreSeries:
        """The score curve: a point for the start and for each iteration, after ``before`` evaluations of others."""
        return ScoreSeries(f"{self.start.label}, optimised", tuple(before + n for n in self.spent), tuple(self.scores))


def _when(iteration: int) -> str:
    return "at the start" if iteration == 0 else f"after iteration {iteration}"
