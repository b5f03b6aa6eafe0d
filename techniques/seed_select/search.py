"""Search among seeds by successive halving: many candidates are sampled with few steps, the best again with more steps.

SeedSelect (arXiv 2304.14530) shows that the seed decides whether a rare concept appears. The search finds good seeds
without gradients. Successive halving is from Non-stochastic Best Arm Identification (arXiv 1502.07943); the resource
that it distributes among the candidates is the number of sampling steps. A sampling run cannot be continued with
another number of steps, so each round samples from scratch.

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
    """Rounds of a search and their cost. The last round samples one candidate with all steps at batch 1."""

    rounds: tuple[Round, ...]
    calls_per_step: int = 1  # calls of the denoiser per step; 2 for second-order samplers

    @property
    def evaluations(self) -> int:
        return sum(self.cost(r.candidates, r.steps) for r in self.rounds)

    @property
    def best_of_all(self) -> int:
        """Number of evaluations to sample every candidate with all steps, for comparison."""
        return self.cost(self.rounds[0].candidates, self.rounds[-1].steps)

    def cost(self, candidates: int, steps: int) -> int:
        return candidates * steps * self.calls_per_step


def plan_search(
    candidates: int, steps: int, *, first_steps: int = 1, survivors: float = 0.25, calls_per_step: int = 1
) -> SearchPlan:
    """Plan of a search. A share ``survivors`` of the candidates passes each round; the steps grow geometrically from
    ``first_steps`` to ``steps``.

    With 64 candidates and 20 steps the rounds are 64x1, 16x3, 4x7 and 1x20 (candidates x steps). This takes 160
    evaluations, 1/8 of the cost of sampling all candidates with all steps. A round with as many steps as the previous
    round is omitted, since it would produce the same scores.
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
            f"candidates {candidates} is not between 1 and {MAX_CANDIDATES}; use 16 to 64, which are usually enough"
        )
    if steps < 1:
        raise ValueError(f"steps {steps} is less than 1; use at least 1, the authors use 20")
    if not 1 <= first_steps <= steps:
        raise ValueError(f"first_steps {first_steps} is not between 1 and steps {steps}; use 1 for the cheapest search")
    if not 0.0 < survivors <= 0.5:
        raise ValueError(
            f"survivors must be above 0 and at most 0.5, got {survivors:g}; use 0.25 to pass a quarter in each round"
        )


@dataclass
class RoundScores:
    """Scores of one round, and the number of sampling steps in this round."""

    steps: int
    scores: dict[int, float] = field(default_factory=dict)  # by index of the candidate, in the order of sampling
    evaluations: list[int] = field(default_factory=list)  # evaluations of the whole search up to each score

    @property
    def ranking(self) -> tuple[int, ...]:
        """Indices of the candidates from best to worst; equal scores are in the order of the candidates."""
        return tuple(sorted(self.scores, key=lambda index: (self.scores[index], index)))


class SeedSearch:
    """One search. Its attributes are valid at any time, so an interrupted search also has a best result.

    ``pick``: rank of the candidate to sample with all steps, as ranked before the last round; 1 is the best.
    ``batch``: number of noises in one call of the sampler's generate().
    """

    def __init__(
        self, candidates: Sequence[Candidate], sampler: SeedSampler, plan: SearchPlan, *, pick: int = 1, batch: int = 1
    ) -> None:
        if len(candidates) != plan.rounds[0].candidates:
            raise ValueError(
                f"{len(candidates)} candidates do not fit a plan for {plan.rounds[0].candidates}; pass plan_search the"
                " number of candidates"
            )
        if not 1 <= pick <= len(candidates):
            raise ValueError(
                f"pick {pick} is not between 1 and {len(candidates)}, the number of candidates; use 1 for the best"
            )
        if batch < 1:
            raise ValueError(f"batch {batch} is less than 1; use 1 to run the candidates one by one")
        self.candidates, self.plan, self.pick, self.batch = tuple(candidates), plan, pick, batch
        self._sampler = sampler
        self.rounds: list[RoundScores] = []
        self.latents: dict[int, Tensor] = {}  # latest latent of each candidate, on the CPU, for the grid
        self.evaluations = 0
        self._final_ranking: tuple[int, ...] | None = None

    @property
    def ranking(self) -> tuple[int, ...]:
        """Scored candidates, sorted by the last round that scored them (later rounds first), then by their last score.

        The final round does not change the ranking, so ``pick`` is the number of the candidate in the grid.
        """
        if self._final_ranking is not None:
            return self._final_ranking
        return tuple(dict.fromkeys(index for scores in reversed(self.rounds) for index in scores.ranking))

    @property
    def done(self) -> bool:
        return len(self.rounds) == len(self.plan.rounds)

    @property
    def best(self) -> SeedResult | None:
        """Result of the candidate of rank ``pick`` if the ranking is final, otherwise of the best candidate so far.

        None before the first score.
        """
        if not self.rounds:
            return None
        if self._final_ranking is not None and not self.done:
            return self._result(self._final_ranking[self.pick - 1])
        return self._result(self.rounds[-1].ranking[0])

    def last_score(self, index: int) -> tuple[float, int]:
        """Score of a candidate in the last round that scored it, and the steps of this round."""
        last = next(r for r in reversed(self.rounds) if index in r.scores)
        return last.scores[index], last.steps

    def lines(self) -> list[str]:
        """Ranking as text, the best first."""
        scored = [(self.candidates[i].label, *self.last_score(i)) for i in self.ranking]
        return [
            f"{k}. {label}: {score:.4f} with {counted(steps, 'step')}"
            for k, (label, score, steps) in enumerate(scored, start=1)
        ]

    def _result(self, index: int) -> SeedResult:
        c = self.candidates[index]
        return c.result(c.noise(), self.latents[index], self.last_score(index)[0])

    @torch.no_grad()
    def run(self, progress: Progress | None = None) -> SeedResult:
        """Run the search; returns the result of the picked candidate, sampled with all steps at batch 1.

        Calls ``progress(done, total, score, latent)`` after each batch. ``done`` and ``total`` are evaluations, ``score`` is
        the best score so far in the current round, and ``latent()`` returns the latent [1, C, *S] with that score. An
        exception raised by ``progress`` ends the run.
        """
        ranking: Sequence[int] = range(len(self.candidates))
        for plan in self.plan.rounds[:-1]:
            self._run_round(ranking[: plan.candidates], plan.steps, progress)
            ranking = self.rounds[-1].ranking
        # a search of one candidate has no round before the last
        self._final_ranking = self.ranking or (0,)
        self._run_round([self._final_ranking[self.pick - 1]], self.plan.rounds[-1].steps, progress)
        return self._result(self.rounds[-1].ranking[0])

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
                latent = self.latents[best]
                progress(self.evaluations, self.plan.evaluations, this.scores[best], lambda x=latent: x)

    def _noise(self, index: int) -> Tensor:
        noise = self.candidates[index].noise()
        check_noise(noise)
        return noise

    def _scores(self, indices: Sequence[int], latents: Tensor, steps: int) -> dict[int, float]:
        scores = self._sampler.score([latents]).detach().flatten().tolist()
        if len(scores) != len(indices) or len(latents) != len(indices):
            raise ValueError(
                f"expected {len(indices)} latents and scores for {len(indices)} noises, got {len(latents)} latents and"
                f" {len(scores)} scores; generate() must return one latent and score() one score for each noise"
            )
        for index, score in zip(indices, scores):
            if not math.isfinite(score):
                raise ValueError(
                    f"the score of {self.candidates[index].label} is {score} with {counted(steps, 'step')}; check that the"
                    " model generates an image with these settings, or run it and the VAE in a wider dtype"
                )
        return dict(zip(indices, scores))

    def series(self) -> list[ScoreSeries]:
        """Score curve with one line per round."""
        return [
            ScoreSeries(
                f"{counted(len(r.scores), 'candidate')}, {counted(r.steps, 'step')}",
                tuple(r.evaluations),
                tuple(r.scores.values()),
            )
            for r in self.rounds
        ]


def counted(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
