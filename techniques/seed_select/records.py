"""What search and optimisation of seeds share: candidates, what was found, and scores over evaluations for the report.

A score is a loss: lower is better. An evaluation is one call of the denoiser with its guidance, per candidate.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Candidate:
    """A noise to be tried. ``noise()`` gives it, [1, C, *S]: by the host for a seed, from a path or an inversion."""

    label: str  # names it in errors and in the report
    noise: Callable[[], Tensor]
    seed: int | None = None  # None where no integer seed gives this noise
    sampler_seed: int = 0  # of what a stochastic sampler draws besides the noise

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
    """A noise with its score and its finished latent."""

    label: str
    seed: int | None
    noise: Tensor  # [1, C, *S], as it was given to generate()
    latent: Tensor  # [1, C, *S]
    score: float
    sampler_seed: int


# done and total evaluations, the best score so far, and what makes the picture of it; see each run()
Progress = Callable[[int, int, float, Callable[[], Tensor]], None]


@dataclass(frozen=True)
class ScoreSeries:
    """One line of the score curve. Series of different step counts must not be compared: their pictures differ."""

    label: str
    evaluations: tuple[int, ...]  # spent when the score was known, ascending
    scores: tuple[float, ...]

    @property
    def best(self) -> tuple[float, ...]:
        """The lowest score so far at each point."""
        return tuple(itertools.accumulate(self.scores, min))


def seed_candidates(first: int, count: int, noise_of: Callable[[int], Tensor]) -> list[Candidate]:
    """Candidates of the integer seeds ``first``, ``first + 1``, …, in 0 to 2⁶⁴ − 1."""
    seeds = [(first + k) % 2**64 for k in range(count)]
    return [Candidate(f"seed {s}", lambda s=s: noise_of(s), s, s) for s in seeds]
