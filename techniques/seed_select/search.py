"""Search among seeds by successive halving: many candidates with few steps, the best of them again with more.

SeedSelect (arXiv 2304.14530) shows that the seed decides whether a rare concept appears; search finds good seeds without
gradients. Halving is that of Non-stochastic Best Arm Identification (arXiv 1502.07943) with steps as the resource.
A run cannot be continued with another number of steps, so that each round starts its candidates anew.

A score is a loss: lower is better. Scores of different rounds are never compared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .prior import check_noise
from .records import Candidate, Progress, ScoreSeries, SeedResult
from .sampler import SeedSampler

MAX_CANDIDATES = 4096


@dataclass(frozen=True)
class Round:
    candidates: int
    steps: int


@dataclass(frozen=True)
class SearchPlan:
    """What a search will spend. The last round runs one candidate with all steps, alone in its batch."""

    rounds: tuple[Round, ...]
    calls_per_step: int = 1  # of the denoiser; 2 for second-order samplers

    @property
    def evaluations(self) -> int:
        return sum(self.cost(r.candidates, r.steps) for r in self.rounds)

    @property
    def best_of_all(self) -> int:
        """Evaluations of a run of every candidate with all steps, to compare with."""
        return self.cost(self.rounds[0].candidates, self.rounds[-1].steps)

    def cost(self, candidates: int, steps: int) -> int:
        return candidates * steps * self.calls_per_step


def plan_search(
    candidates: int, steps: int, *, first_steps: int = 1, survivors: float = 0.25, calls_per_step: int = 1
) -> SearchPlan:
    """Rounds that keep a share of the candidates each, with steps that grow geometrically from ``first_steps``.

    64 candidates of 20 steps make the rounds 64x1, 16x3, 4x7 and 1x20: 160 evaluations, 1/8 of all candidates in full.
    Where two rounds would have the same steps, the second is left out, since it would give the same scores.
    """
    _check_plan(candidates, steps, first_steps, survivors)
    counts = [candidates]
    while counts[-1] > 1:
        counts.append(math.ceil(counts[-1] * survivors))
    growth = (steps / first_steps) ** (1 / max(1, len(counts) - 1))
    rounds = []
    for i, count in enumerate(counts[:-1]):
        steps_here = round(first_steps * growth**i)
        if not rounds or steps_here > rounds[-1].steps:
            rounds.append(Round(count, steps_here))
    return SearchPlan((*rounds, Round(1, steps)), calls_per_step)


def _check_plan(candidates: int, steps: int, first_steps: int, survivors: float) -> None:
    if not 1 <= candidates <= MAX_CANDIDATES:
        raise ValueError(
            f"candidates {candidates} is not in 1 to {MAX_CANDIDATES}; 16 to 64 find most of what there is"
        )
    if steps < 1:
        raise ValueError(f"steps {steps} is less than 1; use at least 1, the authors use 20")
    if not 1 <= first_steps <= steps:
        raise ValueError(f"first_steps {first_steps} is not in 1 to steps {steps}; use 1 for the cheapest search")
    if not 0.0 < survivors <= 0.5:
        raise ValueError(
            f"survivors {survivors:g} is not above 0 and at most 0.5; use 0.25 to keep a quarter in each round"
        )


@dataclass
class RoundScores:
    """What a round found."""

    steps: int
    scores: dict[int, float] = field(default_factory=dict)  # of the candidates by index, in the order in which they ran
    evaluations: list[int] = field(default_factory=list)  # spent by the search when each score was known

    @property
    def ranking(self) -> tuple[int, ...]:
        """The best first; of equal scores the earlier candidate."""
        return tuple(sorted(self.scores, key=lambda index: (self.scores[index], index)))


class SeedSearch:
    """One search. What it knows is in its attributes at any time, so that an interrupted one has its best too.

    ``pick``: which of the ranking before the last round is run with all steps, 1 for the best.
    ``batch``: how many noises the sampler's generate() gets at once.
    """

    def __init__(
        self, candidates: Sequence[Candidate], sampler: SeedSampler, plan: SearchPlan, *, pick: int = 1, batch: int = 1
    ) -> None:
        if len(candidates) != plan.rounds[0].candidates:
            raise ValueError(f"{len(candidates)} candidates do not fit a plan for {plan.rounds[0].candidates}")
        if not 1 <= pick <= len(candidates):
            raise ValueError(
                f"pick {pick} is not in 1 to {len(candidates)}, the number of candidates; use 1 for the best"
            )
        if batch < 1:
            raise ValueError(f"batch {batch} is less than 1; use 1 to run the candidates one by one")
        self.candidates, self.plan, self.pick, self.batch = tuple(candidates), plan, pick, batch
        self._sampler = sampler
        self.rounds: list[RoundScores] = []
        self.latents: dict[int, Tensor] = {}  # of each candidate the latest, on the CPU, for the grid
        self.evaluations = 0
        self._standing: tuple[int, ...] | None = None

    @property
    def ranking(self) -> tuple[int, ...]:
        """Candidates that have a score: who came into a later round is before those who did not.

        The last round does not change it, so that ``pick`` always counts in the order that a grid shows.
        """
        if self._standing is not None:
            return self._standing
        return tuple(dict.fromkeys(index for scores in reversed(self.rounds) for index in scores.ranking))

    @property
    def done(self) -> bool:
        return len(self.rounds) == len(self.plan.rounds)

    @property
    def best(self) -> SeedResult | None:
        """What the search found: the picked candidate in full when it is done, the best so far before, else None."""
        if not self.rounds:
            return None
        if self._standing is not None and not self.done:
            return self._found(self._standing[self.pick - 1])
        return self._found(self.rounds[-1].ranking[0])

    def last_score(self, index: int) -> tuple[float, int]:
        """A candidate's score in its last round, and the steps of that round."""
        last = next(r for r in reversed(self.rounds) if index in r.scores)
        return last.scores[index], last.steps

    def lines(self) -> list[str]:
        """The ranking in words, the best first."""
        scored = [(self.candidates[i].label, *self.last_score(i)) for i in self.ranking]
        return [
            f"{k}. {label}: {score:.4f} with {_counted(steps, 'step')}"
            for k, (label, score, steps) in enumerate(scored, start=1)
        ]

    def _found(self, index: int) -> SeedResult:
        c = self.candidates[index]
        return c.result(c.noise(), self.latents[index], self.last_score(index)[0])

    @torch.no_grad()
    def run(self, progress: Progress | None = None) -> SeedResult:
        """The picked candidate, run with all steps at batch 1.

        ``progress(done, total, score, picture)`` after each batch: evaluations, the best score of this round, and what
        gives its latent [1, C, *S]. What it raises ends the run.
        """
        standing: Sequence[int] = range(len(self.candidates))
        for plan in self.plan.rounds[:-1]:
            self._run_round(standing[: plan.candidates], plan.steps, progress)
            standing = self.rounds[-1].ranking
        # a search of one candidate has no round before the last
        self._standing = self.ranking or (0,)
        self._run_round([self._standing[self.pick - 1]], self.plan.rounds[-1].steps, progress)
        return self._found(self.rounds[-1].ranking[0])

    def _run_round(self, chosen: Sequence[int], steps: int, progress: Progress | None) -> None:
        this = RoundScores(steps)
        for start in range(0, len(chosen), self.batch):
            indices = chosen[start : start + self.batch]
            seeds = [self.candidates[i].sampler_seed for i in indices]
            latents = self._sampler.generate(torch.cat([self._noise(i) for i in indices]), steps, seeds)
            scores = self._scores(indices, latents, steps)
            if start == 0:
                self.rounds.append(this)
            self.evaluations += self.plan.cost(len(indices), steps)
            self.latents |= {i: latents[k : k + 1].detach().cpu().clone() for k, i in enumerate(indices)}
            this.scores |= scores
            this.evaluations += [self.evaluations] * len(indices)
            if progress is not None:
                best = this.ranking[0]
                picture = self.latents[best]
                progress(self.evaluations, self.plan.evaluations, this.scores[best], lambda x=picture: x)

    def _noise(self, index: int) -> Tensor:
        noise = self.candidates[index].noise()
        check_noise(noise)
        return noise

    def _scores(self, indices: Sequence[int], latents: Tensor, steps: int) -> dict[int, float]:
        scores = self._sampler.score([latents]).detach().flatten().tolist()
        if len(scores) != len(indices) or len(latents) != len(indices):
            raise ValueError(
                f"{len(indices)} candidates gave {len(latents)} latents and {len(scores)} scores; generate() and"
                " score() must give one for each noise"
            )
        for index, score in zip(indices, scores):
            if not math.isfinite(score):
                raise ValueError(
                    f"the score of {self.candidates[index].label} is {score} with {_counted(steps, 'step')}; check that the"
                    " model gives a picture with these settings, or run it and the VAE in a wider dtype"
                )
        return dict(zip(indices, scores))

    def series(self) -> list[ScoreSeries]:
        """The score curve, a line for each round."""
        return [
            ScoreSeries(
                f"{_counted(len(r.scores), 'candidate')}, {_counted(r.steps, 'step')}",
                tuple(r.evaluations),
                tuple(r.scores.values()),
            )
            for r in self.rounds
        ]


def _counted(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
