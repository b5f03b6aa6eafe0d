"""Data types of search and optimisation: candidates, results, progress, and score curves for the preview.

A score is a loss: lower is better. An evaluation is one guided call of the denoiser for one candidate.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Candidate:
    """A noise to try: the noise of a seed, a point on a path, or an inversion. ``noise()`` returns it, [1, C, *S]."""

    label: str  # name in errors and in the report
    noise: Callable[[], Tensor]
    seed: int | None = None  # seed of the initial noise, before an optimisation; None if it is not the noise of a seed
    sampler_seed: int = 0  # seed of the noise that a stochastic sampler adds, and of the variation of the prompt

    def result(self, noise: Tensor, latent: Tensor, score: float) -> "SeedResult":
        return SeedResult(
            label=self.label,
            seed=self.seed,
            noise=noise,
            latent=latent,
            score=score,
            sampler_seed=self.sampler_seed,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SeedResult:
    """A noise with its final latent and score."""

    label: str
    seed: int | None
    noise: Tensor  # [1, C, *S], as passed to generate()
    latent: Tensor  # [1, C, *S]
    score: float
    sampler_seed: int


# arguments: done and total evaluations, the best score so far, and a function that returns the latent with this score
Progress = Callable[[int, int, float, Callable[[], Tensor]], None]


@dataclass(frozen=True)
class ScoreSeries:
    """One line of the score curve. Scores of lines with different step counts are not comparable."""

    label: str
    evaluations: tuple[int, ...]  # number of evaluations of the run up to each score, ascending
    scores: tuple[float, ...]

    @property
    def best(self) -> tuple[float, ...]:
        """Lowest score up to each point."""
        return tuple(itertools.accumulate(self.scores, min))


def seed_candidates(first: int, count: int, noise_of: Callable[[int], Tensor], step: int = 1) -> list[Candidate]:
    """Candidates of ``count`` integer seeds ``first``, ``first + step``, …; after 2⁶⁴ − 1 follows 0."""
    return listed_candidates([(first + k * step) % 2**64 for k in range(count)], noise_of)


def listed_candidates(seeds: Iterable[int], noise_of: Callable[[int], Tensor]) -> list[Candidate]:
    """Candidates of integer seeds."""
    return [Candidate(f"seed {s}", lambda s=s: noise_of(s), s, s) for s in seeds]
