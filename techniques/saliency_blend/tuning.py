"""Finds the settings of a blend that score best, at a given cost.

MagicFusion (arXiv 2303.13126) names an automatic choice of the weights as future work; the method here is ours.

A candidate is a point of the space of the settings that may move. It is scored by the mean loss of the images of
several seeds, the same for all candidates. The cost is counted in images of all steps: an image with 8 of 20 steps
costs 0.4. Lower scores are better.

1. The settings as they are connected, and others that are known to work, are scored with all steps and seeds.
2. Low-discrepancy candidates (Halton points, scrambled) are scored with few steps and a part of the seeds.
3. A model of the scores (tuning_model.py) says which candidate is worth the next images: one of the first round, one
   near the best, or a new one. It gets all steps and half of the seeds, and the other half only if it is still worth it.
4. The best is the candidate, of those with all seeds, of which the model expects the lowest score.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from scipy.stats import qmc

from .tuning_model import Array, ScoreModel, Scores
from .tuning_space import Point, Space

SCREENING = 0.5  # the share of the cost that the first round takes
FEW_STEPS = 0.6  # of the steps, in the first round
LEAST_STEPS = 10  # in the first round; with fewer, images of different starts of the experts hardly differ
NEARBY = (0.05, 0.15)  # distances of candidates near the best, in widths of the space
POOL = 64  # new candidates of each kind among which the model chooses
CURIOSITY = 0.5  # how many standard deviations below its mean a candidate counts, so that uncertain ones are tried


class Score(Protocol):
    """Scores a candidate."""

    def __call__(self, point: Point, steps: int, seeds: range) -> Sequence[float]:
        """The losses of the images of ``seeds`` (numbers of the seeds from 0), sampled with ``steps`` steps."""


@dataclass
class Trial:
    """A candidate and its scores by the number of the seed, with ``steps`` steps."""

    point: Point
    steps: int
    scores: dict[int, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The mean over the seeds."""
        return math.fsum(self.scores.values()) / len(self.scores)


@dataclass(frozen=True)
class TuningPlan:
    """How much a search does: ``screened`` candidates in the first round, each with ``few_steps`` and ``few_seeds``."""

    cost: float  # of the search in all, in images of all steps
    steps: int
    seeds: int
    few_steps: int = 0
    few_seeds: int = 0
    screened: int = 0

    @property
    def price(self) -> float:
        """The cost of a candidate of the first round."""
        return self.few_seeds * self.few_steps / self.steps


def plan_tuning(cost: float, steps: int, seeds: int) -> TuningPlan:
    """The plan of a search that costs ``cost`` images of ``steps`` steps, scored over ``seeds`` seeds.

    Errors (ValueError): less cost than two candidates need.
    """
    if steps < 1 or seeds < 1:
        raise ValueError(f"{steps} steps and {seeds} seeds score nothing; use at least 1 of each")
    if cost < 2 * seeds:
        raise ValueError(
            f"{cost:g} evaluations are not enough for two candidates with {seeds} seeds; use at least {2 * seeds}, or"
            " fewer seeds"
        )
    few_steps = min(steps, max(LEAST_STEPS, round(FEW_STEPS * steps)))
    few_seeds = max(1, seeds // 4)
    screened = int(SCREENING * cost / (few_seeds * few_steps / steps))
    return TuningPlan(cost, steps, seeds, few_steps, few_seeds, screened)


class Tuning:
    """One search. Its attributes are valid at any time, so that an interrupted search also has a best candidate.

    ``start``: the point of the settings as they are connected. ``known``: points that are likely to be good. ``seed``: of
    the candidates, not of the images.
    """

    def __init__(
        self, space: Space, start: Point, plan: TuningPlan, score: Score, seed: int = 0, known: Sequence[Point] = ()
    ) -> None:
        self.space, self.start, self.plan, self._score = space, start, plan, score
        self._first = list(dict.fromkeys([start, *known]))
        self.screened: list[Trial] = []  # of the first round, in the order of the run
        self.trials: list[Trial] = []  # with all steps
        self.spent = 0.0
        self._random = np.random.default_rng(seed)
        self._model: tuple[int, ScoreModel] | None = None  # the number of scores that it was fitted to, and the model

    @property
    def finished(self) -> list[Trial]:
        """The trials with all seeds, the best first by the model's estimate; of equal ones, the earlier."""
        trials = [t for t in self.trials if len(t.scores) == self.plan.seeds]
        estimates = self.estimates([t.point for t in trials])[0] if trials else []
        return [trials[k] for k in sorted(range(len(trials)), key=lambda k: estimates[k])]

    @property
    def best(self) -> Trial | None:
        """The best trial so far; None before the connected settings were scored."""
        return next(iter(self.finished), None)

    def estimates(self, points: Sequence[Point]) -> tuple[Array, Array]:
        """The model's means and standard deviations of the scores of ``points`` with all steps."""
        return self.model.estimate(self._places(points))

    @property
    def model(self) -> ScoreModel:
        """The model of all scores so far, of which at least one has all steps."""
        trials = [*self.screened, *self.trials]
        count = sum(len(t.scores) for t in trials)
        if self._model is None or self._model[0] != count:
            rows = [
                (t.point, seed, value, t.steps < self.plan.steps) for t in trials for seed, value in t.scores.items()
            ]
            points, seeds, values, few = zip(*rows, strict=True)
            self._model = (
                count,
                ScoreModel(Scores(self._places(points), np.array(values), np.array(seeds), np.array(few))),
            )
        return self._model[1]

    def run(self, progress: Callable[[], None] = lambda: None) -> Trial:
        """Run the search; ``progress`` is called after each candidate, and may end the run by an exception."""
        plan = self.plan
        for point in self._first if plan.cost > plan.seeds else [self.start]:
            trial = Trial(point, plan.steps)
            self._add(trial, range(plan.seeds))
            self.trials.append(trial)
            progress()
        for number, point in enumerate(self._spread(plan.screened)):
            if self.spent + plan.price > plan.cost + 1e-9:
                break
            trial = Trial(point, plan.few_steps)
            begin = number * plan.few_seeds % plan.seeds  # all seeds in turn
            self._add(trial, range(begin, min(begin + plan.few_seeds, plan.seeds)))
            (self.screened if plan.few_steps < plan.steps else self.trials).append(trial)
            progress()
        while (chosen := self._next()) is not None:
            self._add(*chosen)
            progress()
        best = self.best
        assert best is not None  # the connected settings
        return best

    def _add(self, trial: Trial, seeds: range) -> None:
        """Score ``trial`` for ``seeds``."""
        scores = self._score(trial.point, trial.steps, seeds)
        self.spent += len(seeds) * trial.steps / self.plan.steps
        if wrong := [s for s in scores if not math.isfinite(s)]:
            raise ValueError(
                f"the score of a candidate is {wrong[0]}; check that the blend generates an image with these settings"
            )
        trial.scores |= dict(zip(seeds, scores, strict=True))

    def _next(self) -> tuple[Trial, range] | None:
        """The candidate that gets the next images, and their seeds; None if the cost is spent or nothing is left."""
        plan, left = self.plan, self.plan.cost - self.spent + 1e-9
        half = math.ceil(plan.seeds / 2)
        unfinished = [t for t in self.trials if len(t.scores) < plan.seeds]
        begun = [t for t in unfinished if plan.seeds - len(t.scores) <= left]
        # a new candidate needs the cost of all its seeds, so that it can be finished
        new = self._pool() if plan.seeds <= left else []
        if not begun and not new:
            return None
        points = [*(t.point for t in begun), *new]
        means, deviations = self.estimates(points)
        # at the end, there is no time left to try what is uncertain
        curiosity = CURIOSITY if left >= 2 * plan.seeds else 0.0
        k = int(np.argmin(means - curiosity * deviations))
        if k >= len(begun):
            trial = Trial(new[k - len(begun)], plan.steps)
            self.trials.append(trial)
            return trial, range(half)
        trial = begun[k]
        missing = [seed for seed in range(plan.seeds) if seed not in trial.scores]
        first = missing[0]
        # consecutive seeds, in at most two parts
        stop = next((seed for seed in range(first, plan.seeds) if seed in trial.scores), plan.seeds)
        return trial, range(first, stop)

    def _pool(self) -> list[Point]:
        """New candidates: those of the first round, spread ones, and some near the best."""
        known = {trial.point for trial in self.trials}
        points = [trial.point for trial in self.screened] + self._spread(POOL)
        near = [trial.point for trial in self.finished[:2]]
        if self.screened:
            means = self.estimates([t.point for t in self.screened])[0]
            near.append(self.screened[int(np.argmin(means))].point)
        for point in near:
            for distance in NEARBY:
                points += [self._near(point, distance) for _ in range(POOL // 4)]
        return [point for point in dict.fromkeys(points) if point not in known]

    def _spread(self, count: int) -> list[Point]:
        """Up to ``count`` different points that cover the space evenly, without ``start``."""
        if not self.space or not count:
            return []
        rows = qmc.Halton(len(self.space), seed=self._random).random(count)
        points = (tuple(s.at(float(u)) for s, u in zip(self.space, row, strict=True)) for row in rows)
        return [point for point in dict.fromkeys(points) if point not in self._first]

    def _near(self, point: Point, distance: float) -> Point:
        """A point at about ``distance`` from ``point`` in each setting."""
        found = []
        for setting, value in zip(self.space, point, strict=True):
            if setting.values:  # a list has no distances: another value at most as often as the distance is large
                found.append(setting.at(self._random.random()) if self._random.random() < distance else value)
            else:
                found.append(setting.at(setting.place(value) + self._random.normal(0.0, distance)))
        return tuple(found)

    def _places(self, points: Sequence[Point]) -> Array:
        """[N, D] in 0..1."""
        rows = [[s.place(v) for s, v in zip(self.space, point, strict=True)] for point in points]
        return np.array(rows, dtype=float).reshape(len(points), len(self.space))
