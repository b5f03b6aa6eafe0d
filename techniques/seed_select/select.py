"""SeedSelect: selects initial noise for a rare concept from a few reference images, without fine-tuning.

The method is from "Generating images of rare concepts using pre-trained diffusion models" (arXiv 2304.14530). The initial
noises (setting ``start``) are from "Norm-guided latent space exploration" (NAO, arXiv 2306.08687). Only the noise changes.
The files:
- ``losses``: distance of an image to the references;
- ``search``: successive halving over many seeds;
- ``optimize``: gradient descent on one noise through the sampling;
- ``inversion``: inversion of a reference image to the noise from which the model generates it;
- ``path``: centroid of inverted noises, and paths between two noises, along which more images are generated;
- ``prior``: distribution of the norm of random noise;
- ``prompt_variation``: noise on the embeddings of the prompt, for models that are distilled to few steps;
- ``sampler``: interface to the model.
This file combines them. ``start`` sets the candidates, ``mode`` sets how noises are selected from them, and ``count`` is
the number of images.

A score is a loss: lower is better. An evaluation is one guided call of the denoiser for one candidate.
Shapes: B samples, C channels, S spatial axes (H, W).
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ...common.settings import check_choice, check_share
from .optimize import OptimizeSettings, SeedOptimization
from .path import norm_aware_centroid, norm_aware_path
from .prompt_variation import VARIATION_END
from .records import Candidate, Progress, ScoreSeries, SeedResult, listed_candidates, seed_candidates
from .sampler import SeedGradients, SeedSampler
from .search import SearchPlan, SeedSearch, counted, plan_search

MODES = ("search", "optimize", "search+optimize")
STARTS = ("noise", "inversion", "centroid")

S = TypeVar("S", bound=SeedSampler)


@dataclass(frozen=True, kw_only=True)
class SeedSelectSettings:
    """Settings of a selection.

    ``start`` sets the candidates. "noise": random noises of consecutive seeds. "inversion": the references inverted to
    noise. "centroid": the centroid of these inverted noises, and points on the paths from the centroid to each of them.

    If ``shares`` machines search together, machine ``share`` searches ``candidates`` seeds: ``seed + share``,
    ``seed + share + shares`` and so on. No two machines search the same seed, even if their ``candidates`` differ. If
    ``seeds`` is not empty, exactly these seeds are the candidates instead. Both need start "noise".
    """

    mode: str = "search"
    start: str = "noise"
    seed: int = 0  # seed of the first candidate
    candidates: int = 16
    pick: int = 1  # rank of the first selected candidate; without a search, the number of this candidate, from 1
    count: int = 1  # number of images; their noises are on the path between the two best noises
    steps: int = 20
    first_steps: int = 1  # steps in the first round of a search
    survivors: float = 0.25  # share of the candidates that pass each round of a search
    optimized: int = 1  # number of noises to optimise; at least two are optimised if count is above 1
    optimize: OptimizeSettings = field(default_factory=OptimizeSettings)
    # strength of the noise on the prompt's embeddings, which the sampler draws from the seed of each candidate; 0: none
    prompt_variation: float = 0.0
    share: int = 0  # number of this machine, from 0
    shares: int = 1  # number of machines
    seeds: tuple[int, ...] = ()  # repeated seeds are searched once

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("start", STARTS)):
            check_choice(name, getattr(self, name), known)
        for name in ("candidates", "pick", "count", "steps", "optimized"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is less than 1; use at least 1")
        check_share(self.share, self.shares)
        self._check_start()
        if (self.searches or self.seeds) and self.pick + self.selected - 1 > self.available:
            what, remedy = ("seeds", "add seeds") if self.seeds else ("candidates", "raise candidates")
            raise ValueError(
                f"expected at least {self.pick + self.selected - 1} {what} to select {counted(self.selected, 'noise')}"
                f" starting at pick {self.pick}, got {self.available}; {remedy}, or lower pick, count or optimized"
            )
        if self.searches:
            self.plan(self.available)

    def _check_start(self) -> None:
        given = f"shares {self.shares}" if self.shares > 1 else "the list in seeds" if self.seeds else ""
        if given and self.start != "noise":
            raise ValueError(
                f"{given} needs start noise, since the candidates of start {self.start} come from the references; use start"
                " noise, or set shares to 1 and leave seeds empty"
            )

    @property
    def listed(self) -> tuple[int, ...]:
        """``seeds``, each once."""
        return tuple(dict.fromkeys(self.seeds))

    @property
    def available(self) -> int:
        """Number of candidates of this machine."""
        return len(self.listed) or self.candidates

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
    def selected(self) -> int:
        """Number of noises to select. For more than one image it is at least two, since a path needs two ends."""
        ends = min(self.count, 2)
        return max(ends, self.optimized) if self.optimizes else ends


class SeedSelect(Generic[S]):
    """One run of SeedSelect: ``choose``, then ``optimize`` if the mode includes it, then ``generate``.

    The parts are separate calls, since ``optimize`` needs a session, which the caller opens. The attributes are valid at
    any time, so an interrupted run also has a ``best``.

    Each part calls ``progress(done, total, score, latent)`` repeatedly. ``done`` and ``total`` are evaluations of the whole
    run. ``score`` is the best score so far in the current part, and ``latent()`` returns the latent with that score. An
    exception raised by ``progress`` ends the part.
    """

    def __init__(self, settings: SeedSelectSettings, sampler: S) -> None:
        if settings.optimizes and sampler.gradient_cost is None:
            raise ValueError(f"mode {settings.mode} needs a differentiable sampler; use mode search")
        self.settings, self.sampler = settings, sampler
        self._check_references()
        self.search: SeedSearch | None = None
        self.chosen: Sequence[Candidate] = ()  # noises, the best first
        self.optimizations: list[SeedOptimization] = []
        self.results: list[SeedResult] = []  # one for each image
        self.planned = 0  # planned evaluations, without the inversions; set before the first candidate is sampled
        self._batch = sampler.batch_size(settings.available)
        self._spent_on_results = 0

    @property
    def evaluations(self) -> int:
        """Number of evaluations so far, without the inversions."""
        searched = self.search.evaluations if self.search else 0
        return searched + sum(o.evaluations for o in self.optimizations) + self._spent_on_results

    @property
    def best(self) -> SeedResult | None:
        """Result of the first image if it is generated, otherwise the best result so far; None before any score."""
        if self.results:
            return self.results[0]
        if optimized := self._optimized:
            return min(optimized, key=lambda result: result.score)
        return self.search.best if self.search else None

    @property
    def _optimized(self) -> list[SeedResult]:
        """Best result of each optimisation so far; an interrupted optimisation may have no result."""
        return [replace(o.best, label=o.label) for o in self.optimizations if o.best is not None]

    def choose(self, progress: Progress | None = None) -> None:
        """Choose the noises to optimise or to generate from, starting at ``pick``: after a search in the order of their
        rank, otherwise in the order of the candidates."""
        s = self.settings
        pool = self._pool()
        self._plan(pool)
        chosen = pool[s.pick - 1 :]
        if self.search:
            self.search.run(self._within(progress))
            chosen = [pool[i] for i in self.search.ranking[s.pick - 1 :]]
        self.chosen = chosen[: s.selected]

    def optimize(self, gradients: SeedGradients, progress: Progress | None = None) -> None:
        """Optimise the chosen noises one by one and sort them by score."""
        for start in self.chosen:
            self.optimize_one(start, gradients, progress)
        self.sort_optimized()

    def optimize_one(self, start: Candidate, gradients: SeedGradients, progress: Progress | None = None) -> None:
        """Optimise one of the chosen noises; ``sort_optimized`` completes the part after the last one."""
        optimization = SeedOptimization(start, gradients, self.settings.optimize, self.sampler.gradient_cost)
        self.optimizations.append(optimization)
        optimization.run(self._within(progress))

    def sort_optimized(self) -> None:
        """Replace the chosen noises by the optimised ones, the best first."""
        results = sorted(self._optimized, key=lambda result: result.score)
        self.chosen = [Candidate(r.label, lambda r=r: r.noise, r.seed, r.sampler_seed) for r in results]

    @torch.no_grad()
    def generate(self, progress: Progress | None = None) -> list[SeedResult]:
        """Generate ``count`` images with all steps at batch 1; returns their results, the best noise first.

        ``progress`` receives the score of the first image and the latent of the newest image.
        """
        best = self.search.best if self.search and not self.settings.optimizes else None
        if best is not None:
            self.results = [best]
        for candidate in self._image_noises(self.chosen)[len(self.results) :]:
            result = self._sample(candidate)
            if progress is not None:
                progress(self.evaluations, self.planned, self.results[0].score, lambda x=result.latent: x)
        return self.results

    @torch.no_grad()
    def finish_interrupted(self) -> list[SeedResult]:
        """Results of an interrupted run; if it has none yet, the image of the best noise so far is generated first.

        Requires that ``best`` is not None.
        """
        if not self.results:
            best = self.best
            assert best is not None  # the caller has checked it
            if not self._optimized and self.search and self.search.done:
                self.results = [best]
            else:
                self._sample(Candidate(best.label, lambda: best.noise, best.seed, best.sampler_seed))
        return self.results

    def _check_references(self) -> None:
        """Raise a ValueError for too few references, before they are inverted, which takes long."""
        s = self.settings
        if s.start == "noise":
            return
        references, needed = self.sampler.references, s.pick + s.selected - 1
        if s.start == "centroid" and references < 2:
            raise ValueError(
                f"start centroid needs at least 2 references, got {references}; connect more, or set start to noise or"
                " inversion"
            )
        if s.start == "inversion" and references < needed:
            raise ValueError(
                f"expected at least {needed} references for start inversion to select {counted(s.selected, 'noise')}"
                f" starting at pick {s.pick}, got {references}; add references, lower pick, count or optimized, or use"
                " start noise"
            )

    def _pool(self) -> list[Candidate]:
        """Candidates that ``start`` specifies: all of them for a search, otherwise only as many as are needed.

        With start "inversion" there is one candidate for each reference, so there may be fewer than ``candidates``.
        """
        s = self.settings
        size = s.available if s.searches else s.pick + s.selected - 1
        if s.listed:
            return listed_candidates(s.listed[:size], self.sampler.noise_of)
        if s.start == "noise":
            return seed_candidates(s.seed + s.share, size, self.sampler.noise_of, step=s.shares)
        noises = self.sampler.inversions()
        if s.start == "centroid":
            return self._with_variations(centroid_candidates(noises, size, s.seed))
        inverted = list(noises.items())[:size]
        return self._with_variations(
            [Candidate(f"reference {k}", lambda x=x: x, sampler_seed=s.seed) for k, x in inverted]
        )

    def _with_variations(self, pool: Sequence[Candidate]) -> list[Candidate]:
        """Candidates without a seed of their own, each with another variation of the prompt."""
        if self.settings.prompt_variation == 0.0:
            return list(pool)
        return [replace(c, sampler_seed=(self.settings.seed + k) % 2**64) for k, c in enumerate(pool)]

    def _plan(self, pool: Sequence[Candidate]) -> None:
        s = self.settings
        runs = s.count
        if s.searches:
            plan = s.plan(len(pool), self.sampler.calls_per_step)
            self.search = SeedSearch(pool, self.sampler, plan, pick=s.pick, batch=self._batch)
            self.planned += plan.evaluations
            if not s.optimizes:
                runs -= 1  # the last round of the search samples the first image
        if s.optimizes:
            cost = self.sampler.gradient_cost
            assert cost is not None  # checked in __init__
            self.planned += s.selected * s.optimize.planned(cost)
        self.planned += runs * self._full_run_cost

    @property
    def _full_run_cost(self) -> int:
        return self.settings.steps * self.sampler.calls_per_step

    def _sample(self, c: Candidate) -> SeedResult:
        """Sample a candidate with all steps, score it and append it to ``results``."""
        noise = c.noise()
        latent = self.sampler.generate(noise, self.settings.steps, [c.sampler_seed]).cpu()
        score = float(self.sampler.score([latent]))
        if not math.isfinite(score):
            raise ValueError(f"the score of {c.label} is {score}; run the model and the VAE in a wider dtype")
        self.results.append(c.result(noise, latent, score))
        self._spent_on_results += self._full_run_cost
        return self.results[-1]

    def _image_noises(self, chosen: Sequence[Candidate]) -> list[Candidate]:
        """One noise per image: the best noise, evenly spaced points on the path to the second best, and the second best."""
        if self.settings.count == 1:
            return [chosen[0]]
        first, second = chosen[:2]
        path = norm_aware_path(first.noise(), second.noise())
        shares = [k / (self.settings.count - 1) for k in range(1, self.settings.count - 1)]
        labels = [f"{100 * t:.0f} % from {first.label} to {second.label}" for t in shares]
        between = [
            Candidate(label, lambda t=t: path.at(t), sampler_seed=first.sampler_seed)
            for label, t in zip(labels, shares)
        ]
        if self.settings.prompt_variation:  # the images of a path have the same prompt
            second = replace(second, sampler_seed=first.sampler_seed)
        return [first, *between, second]

    def _within(self, progress: Progress | None) -> Progress | None:
        """Progress callback of one part; calls ``progress`` with the evaluations of the whole run instead of the part."""
        if progress is None:
            return None
        return lambda done, total, score, latent: progress(self.evaluations, self.planned, score, latent)

    def series(self) -> list[ScoreSeries]:
        """Score curve over all evaluations, with one line for each round of the search and each optimised noise."""
        lines = self.search.series() if self.search else []
        before = self.search.evaluations if self.search else 0
        for optimization in self.optimizations:
            if optimization.scores:  # an interrupted optimisation may have none
                lines.append(optimization.series(before))
            before += optimization.evaluations
        return lines

    def report(self) -> str:
        """Text with the results, their cost, and whether a seed reproduces the first image."""
        s = self.settings
        lines = [f"image {k}, {r.label}: score {r.score:.4f}" for k, r in enumerate(self.results, start=1)]
        if self.results:
            lines.append(self._reproduction(self.results[0]))
            if s.prompt_variation:
                lines.append(self._variation(self.results[0]))
        lines.append("the score is a distance to the references: a lower score is better")
        lines += [line for o in self.optimizations for line in o.lines()]
        scores = [f"{result.score:.4f}" for result in self._optimized]
        if scores and self.results and f"{self.results[0].score:.4f}" not in scores:
            lines.append(
                "an optimisation scores up to three last steps of its sampling, a result only its final latent, so their"
                " scores differ"
            )
        lines.append(f"mode {s.mode}, start {s.start}: {self.evaluations} of {self.planned} planned model evaluations")
        lines += self._source_of_seeds()
        if self.search:
            rounds = ", ".join(f"{len(r.scores)} with {r.steps}" for r in self.search.rounds)
            lines += [
                f"searched (candidates with steps): {rounds}; all candidates with all steps would take"
                f" {self.search.plan.best_of_all} evaluations",
                *self.search.lines(),
            ]
        return "\n".join(lines)

    def _source_of_seeds(self) -> list[str]:
        """Line about listed seeds or several machines; none for the consecutive seeds of one machine."""
        s = self.settings
        if s.listed:
            repeated = len(s.seeds) - len(s.listed)
            note = f" ({counted(repeated, 'repetition')} left out)" if repeated else ""
            return [
                f"candidates: {counted(len(s.listed), 'listed seed')}{note}; seed, candidates and share are not used"
            ]
        if s.shares > 1:
            first = (s.seed + s.share) % 2**64
            return [f"share {s.share} of {s.shares} shares, counted from 0: seeds from {first} in steps of {s.shares}"]
        return []

    def _reproduction(self, result: SeedResult) -> str:
        if result.seed is None:
            return "no integer seed generates this noise, so none reproduces the result; save the noise"
        if self._is_noise_of_its_seed(result):
            prompt = " with the varied prompt" if self.settings.prompt_variation else ""
            return f"seed {result.seed} reproduces the result in a plain sampler at batch 1{prompt}"
        return f"seed {result.seed} generates only the initial noise and does not reproduce the result; save the noise"

    def _is_noise_of_its_seed(self, result: SeedResult) -> bool:
        return result.seed is not None and torch.equal(result.noise.cpu(), self.sampler.noise_of(result.seed).cpu())

    def _variation(self, result: SeedResult) -> str:
        """Text with the settings of Vary Prompt that give the prompt of ``result``, the first image."""
        seed = result.sampler_seed
        node = f"Vary Prompt with seed {seed}, strength {self.settings.prompt_variation}, end_percent {VARIATION_END}"
        if self._is_noise_of_its_seed(result):
            text = f"to repeat in KSampler: {node}, then KSampler with seed {result.seed}"
        else:
            text = f"to repeat with the saved noise: {node}, then SamplerCustomAdvanced"
        return f"{text}; all images have this variation of the prompt" if self.settings.count > 1 else text


def centroid_candidates(seeds: Mapping[int, Tensor], number: int, sampler_seed: int = 0) -> list[Candidate]:
    """``number`` candidates: the centroid of at least two noises, then evenly spaced points on its paths to these noises.

    ``seeds``: the inverted noises of references, by the numbers of the references.
    NAO's authors also use the points on these paths as initial noises. The last point on each path is the noise itself.
    """
    numbers = list(seeds)
    centroid, paths = norm_aware_centroid(list(seeds.values()))
    candidates = [Candidate("centroid", lambda: centroid, sampler_seed=sampler_seed)]
    stops = math.ceil((number - 1) / len(paths))
    for k in range(number - 1):
        which, share = k % len(paths), (k // len(paths) + 1) / stops
        label = f"{100 * share:.0f} % from the centroid to reference {numbers[which]}"
        at = functools.partial(paths[which].at, share)
        candidates.append(Candidate(label, at, sampler_seed=sampler_seed))
    return candidates
