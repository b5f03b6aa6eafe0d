"""SeedSelect: the right initial noise for a rare concept, from a few reference pictures, without fine-tuning.

Generating images of rare concepts using pre-trained diffusion models (arXiv 2304.14530), with the starts of Norm-guided
latent space exploration (NAO, arXiv 2306.08687). Everything but the noise stays as it is. The parts:
- ``losses``: how far a picture is from the references;
- ``search``: many seeds, little spent on bad ones;
- ``optimize``: the gradient on one noise through the sampling;
- ``inversion``: the noise from which a reference would come, for a start;
- ``path``: the centroid of such noises, and the noises between two found ones, for more than one picture;
- ``prior``: which norms a noise may have;
- ``sampler``: what is asked of the model.
This file joins them: candidates by ``start``, found noises by ``mode``, pictures by ``count``.

A score is a loss: lower is better. An evaluation is one call of the denoiser with its guidance, per candidate.
Shapes: B samples, C channels, S spatial axes (H, W).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .optimize import OptimizeSettings, SeedOptimization
from .path import norm_aware_centroid, norm_aware_path
from .records import Candidate, Progress, ScoreSeries, SeedResult, seed_candidates
from .sampler import SeedGradients, SeedSampler
from .search import SearchPlan, SeedSearch, plan_search

MODES = ("search", "optimize", "search+optimize")
STARTS = ("noise", "inversion", "centroid")

S = TypeVar("S", bound=SeedSampler)


@dataclass(frozen=True, kw_only=True)
class SeedSelectSettings:
    """What to find. ``start`` names the candidates: noises of seeds, the references' inversions, or their centroid and
    points on the way from it to the inversions."""

    mode: str = "search"
    start: str = "noise"
    seed: int = 0  # of the first candidate
    candidates: int = 16
    pick: int = 1  # which of the ranking; where nothing is searched, which of the candidates
    count: int = 1  # pictures; more than one lie between the two best noises
    steps: int = 20
    first_steps: int = 1  # of the first round of a search
    survivors: float = 0.25  # share of the candidates that a round of a search keeps
    optimized: int = 1  # how many noises are optimised; with more than one picture at least two
    optimize: OptimizeSettings = field(default_factory=OptimizeSettings)

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("start", STARTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} '{getattr(self, name)}' is unknown; use one of {', '.join(known)}")
        for name in ("candidates", "pick", "count", "steps", "optimized"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is less than 1; use at least 1")
        if self.searches and self.pick + self.needed - 1 > self.candidates:
            raise ValueError(
                f"pick {self.pick} and {self.needed} noises need {self.pick + self.needed - 1} candidates and there are"
                f" {self.candidates}; raise candidates or lower pick, count or optimized"
            )
        if self.searches:
            self.plan(self.candidates)

    def plan(self, candidates: int, calls_per_step: int = 1) -> SearchPlan:
        return plan_search(
            candidates,
            self.steps,
            first_steps=self.first_steps,
            survivors=self.survivors,
            calls_per_step=calls_per_step,
        )

    @property
    def searches(self) -> bool:
        return "search" in self.mode

    @property
    def optimizes(self) -> bool:
        return "optimize" in self.mode

    @property
    def needed(self) -> int:
        """Noises to be found: two are the ends of the path on which more than one picture lie."""
        ends = min(self.count, 2)
        return max(ends, self.optimized) if self.optimizes else ends


class SeedSelect(Generic[S]):
    """One run: ``choose``, then ``optimize`` if the settings ask for it, then ``draw``.

    The parts are called one by one, since a gradient can be had only inside a session that the caller opens. What it
    knows is in its attributes at any time, so that an interrupted one has its ``best`` too. ``progress(done, total,
    score, picture)``: evaluations of the whole, the best score so far of what is running, and what gives its latent.
    What it raises ends the part.
    """

    def __init__(self, settings: SeedSelectSettings, sampler: S) -> None:
        if settings.optimizes and sampler.gradient_cost is None:
            raise ValueError(f"mode {settings.mode} needs a sampler that is open to gradients; use mode search")
        self.settings, self.sampler = settings, sampler
        self.search: SeedSearch | None = None
        self.chosen: Sequence[Candidate] = ()  # noises, the best first
        self.optimizations: list[SeedOptimization] = []
        self.pictures: list[SeedResult] = []
        self.planned = 0  # evaluations, without those of the inversions; known when the first candidate is run
        self._batch = sampler.batch_size(settings.candidates)
        self._spent_on_pictures = 0

    @property
    def evaluations(self) -> int:
        """Spent so far, without those of the inversions."""
        searched = self.search.evaluations if self.search else 0
        return searched + sum(o.evaluations for o in self.optimizations) + self._spent_on_pictures

    @property
    def best(self) -> SeedResult | None:
        """The first picture when there is one, before that the best noise so far with its latent, else None."""
        if self.pictures:
            return self.pictures[0]
        if optimized := self._optimized:
            return min(optimized, key=lambda found: found.score)
        return self.search.best if self.search else None

    @property
    def _optimized(self) -> list[SeedResult]:
        """The best of each optimisation so far; an interrupted one may have none."""
        return [o.best for o in self.optimizations if o.best is not None]

    def choose(self, progress: Progress | None = None) -> None:
        """Choose the noises to optimise or draw: candidates by ``start``, the best of them where they are searched."""
        s = self.settings
        pool = self._pool()
        self._plan(pool)
        chosen = pool[s.pick - 1 :]
        if self.search:
            self.search.run(self._within(progress))
            chosen = [pool[i] for i in self.search.ranking[s.pick - 1 :]]
        self.chosen = chosen[: s.needed]

    def optimize(self, gradients: SeedGradients, progress: Progress | None = None) -> None:
        """Optimise the chosen noises one after the other, and put the best first."""
        for start in self.chosen:
            optimization = SeedOptimization(start, gradients, self.settings.optimize, self.sampler.gradient_cost)
            self.optimizations.append(optimization)
            optimization.run(self._within(progress))
        results = sorted(self._optimized, key=lambda result: result.score)
        self.chosen = [Candidate(f"{r.label}, optimised", lambda r=r: r.noise, r.seed, r.sampler_seed) for r in results]

    @torch.no_grad()
    def draw(self, progress: Progress | None = None) -> list[SeedResult]:
        """Return ``count`` pictures, that of the best noise first, each from a run of all steps at batch 1."""
        found = self.search.best if self.search and not self.settings.optimizes else None
        if found is not None:
            self.pictures = [found]
        for candidate in self._stops(self.chosen)[len(self.pictures) :]:
            result = self._picture(candidate)
            if progress is not None:
                progress(self.evaluations, self.planned, self.pictures[0].score, lambda x=result.latent: x)
        return self.pictures

    @torch.no_grad()
    def settle(self) -> list[SeedResult]:
        """After an interrupt: the pictures so far, or else that of the best noise so far, from a run of all steps.

        Needs a ``best``.
        """
        if not self.pictures:
            best, optimized = self.best, bool(self._optimized)
            assert best is not None  # the caller has seen one
            if not optimized and self.search and self.search.done:
                self.pictures = [best]
            else:
                label = f"{best.label}, optimised" if optimized else best.label
                self._picture(Candidate(label, lambda: best.noise, best.seed, best.sampler_seed))
        return self.pictures

    def _pool(self) -> list[Candidate]:
        """The candidates by ``start``: as many as are searched, else as many as are needed; fewer if there are fewer."""
        s = self.settings
        wanted = s.pick + s.needed - 1
        size = s.candidates if s.searches else wanted
        if s.start == "noise":
            return seed_candidates(s.seed, size, self.sampler.noise_of)
        noises = list(self.sampler.inversions())
        if s.start == "centroid":
            return centroid_candidates(noises, size, s.seed)
        if len(noises) < wanted:
            raise ValueError(
                f"start inversion gives {len(noises)} noises, one for each reference, and pick {s.pick} with {s.needed} to"
                f" be found needs {wanted}; add references, lower pick or count, or use start noise"
            )
        return [
            Candidate(f"reference {k}", lambda x=x: x, sampler_seed=s.seed)
            for k, x in enumerate(noises[:size], start=1)
        ]

    def _plan(self, pool: Sequence[Candidate]) -> None:
        s = self.settings
        pictures = s.count
        if s.searches:
            plan = s.plan(len(pool), self.sampler.calls_per_step)
            self.search = SeedSearch(pool, self.sampler, plan, pick=s.pick, batch=self._batch)
            self.planned += plan.evaluations
            if not s.optimizes:
                pictures -= 1  # the search ends with it
        if s.optimizes:
            cost = self.sampler.gradient_cost
            assert cost is not None  # __init__ refuses a sampler without gradients
            self.planned += s.needed * s.optimize.planned(cost)
        self.planned += pictures * self._cost_of_picture

    @property
    def _cost_of_picture(self) -> int:
        return self.settings.steps * self.sampler.calls_per_step

    def _picture(self, c: Candidate) -> SeedResult:
        noise = c.noise()
        latent = self.sampler.generate(noise, self.settings.steps, [c.sampler_seed]).cpu()
        score = float(self.sampler.score([latent]))
        if not math.isfinite(score):
            raise ValueError(f"the score of {c.label} is {score}; run the model and the VAE in a wider dtype")
        self.pictures.append(c.result(noise, latent, score))
        self._spent_on_pictures += self._cost_of_picture
        return self.pictures[-1]

    def _stops(self, chosen: Sequence[Candidate]) -> list[Candidate]:
        """A noise for each picture: the best, those evenly on the way to the second, and the second itself."""
        if self.settings.count == 1:
            return [chosen[0]]
        first, second = chosen[:2]
        path = norm_aware_path(first.noise(), second.noise())
        shares = [k / (self.settings.count - 1) for k in range(1, self.settings.count - 1)]
        labels = [f"{100 * t:.0f} % from {first.label} to {second.label}" for t in shares]
        way = [
            Candidate(label, lambda t=t: path.at(t), sampler_seed=first.sampler_seed)
            for label, t in zip(labels, shares)
        ]
        return [first, *way, second]

    def _within(self, progress: Progress | None) -> Progress | None:
        """``progress`` of a part, told in evaluations of the whole."""
        if progress is None:
            return None
        return lambda done, total, score, picture: progress(self.evaluations, self.planned, score, picture)

    def series(self) -> list[ScoreSeries]:
        """The score curve: a line for each round of the search and each optimised noise, over all evaluations."""
        lines = self.search.series() if self.search else []
        before = self.search.evaluations if self.search else 0
        for optimization in self.optimizations:
            if optimization.scores:  # an interrupted one may have none
                lines.append(optimization.series(before))
            before += optimization.evaluations
        return lines

    def report(self) -> str:
        """What was found, what it cost, and whether a seed reproduces it."""
        s = self.settings
        lines = [f"mode {s.mode}, start {s.start}: {self.evaluations} of {self.planned} planned model evaluations"]
        if self.search:
            rounds = ", ".join(f"{len(r.scores)} with {r.steps}" for r in self.search.rounds)
            lines += [
                f"searched (candidates with steps): {rounds}; all candidates in full: {self.search.plan.best_of_all}",
                *self.search.lines(),
            ]
        for o in self.optimizations:
            if o.best is not None:
                lines.append(
                    f"optimised {o.start.label}: score {o.scores[0]:.4f} to {o.best.score:.4f} in {len(o.scores) - 1} iterations,"
                    f" best after {o.best_iteration}; norm {o.norms[0]:.2f} to {o.norms[o.best_iteration]:.2f}"
                )
        lines += [f"picture {k}, {f.label}: score {f.score:.4f}" for k, f in enumerate(self.pictures, start=1)]
        if self.pictures:
            lines.append(self._reproduction(self.pictures[0]))
        return "\n".join(lines)

    def _reproduction(self, found: SeedResult) -> str:
        if found.seed is None:
            return "no seed gives this noise and none reproduces the result; save the noise"
        if torch.equal(found.noise.cpu(), self.sampler.noise_of(found.seed).cpu()):
            return f"seed {found.seed} reproduces the result in a plain sampler at batch 1"
        return f"seed {found.seed} is that of the start and does not reproduce the result; save the noise"


def centroid_candidates(seeds: Sequence[Tensor], number: int, sampler_seed: int = 0) -> list[Candidate]:
    """The norm-aware centroid of at least two seeds, then points of its paths to them, evenly, ``number`` in all.

    As NAO's authors take every point of these paths for a start. The paths' ends are the seeds themselves.
    """
    centroid, paths = norm_aware_centroid(seeds)
    candidates = [Candidate("centroid", lambda: centroid, sampler_seed=sampler_seed)]
    stops = math.ceil((number - 1) / len(paths))
    for k in range(number - 1):
        which, share = k % len(paths), (k // len(paths) + 1) / stops
        label = f"{100 * share:.0f} % from the centroid to reference {which + 1}"
        at = functools.partial(paths[which].at, share)
        candidates.append(Candidate(label, at, sampler_seed=sampler_seed))
    return candidates
