"""SeedSelect as a whole, on a small model with an exact denoiser."""

import itertools
import math

import pytest
import torch

from chorus.techniques.seed_select.inversion import invert
from chorus.techniques.seed_select.losses import ReferenceLoss, embedding_centroid, latent_centroid, vp_scale
from chorus.techniques.seed_select.optimize import OptimizeSettings
from chorus.techniques.seed_select.path import norm_aware_centroid, norm_aware_path
from chorus.techniques.seed_select.sampler import GradientCost
from chorus.techniques.seed_select.select import SeedSelect, SeedSelectSettings, centroid_candidates

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (1, 3, 4, 4)
FEW = OptimizeSettings(iterations=3)


def noise_of(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


PROTOTYPES = torch.cat([noise_of(1000 + k) for k in range(5)])
REFERENCES = PROTOTYPES[:2] * 0.9 + 0.1 * torch.cat([noise_of(2000 + k) for k in range(2)])


def denoise(x, sigma):
    """Exact denoiser of a mixture of five narrow Gaussians; the noise decides which of them is generated."""
    s = sigma.view(-1, 1)
    spread = 0.3**2 + s**2
    distance = ((x.flatten(1)[:, None] - PROTOTYPES.flatten(1)) ** 2).sum(-1)
    weights = torch.softmax(-distance / (2 * spread), dim=1)
    mean = (weights @ PROTOTYPES.flatten(1)).view_as(x)
    return mean + (x - mean) * (0.3**2 / spread).view(-1, 1, 1, 1)


def schedule(steps):
    return torch.cat([torch.linspace(math.log(8), math.log(0.05), steps).exp(), torch.zeros(1)])


def embed(x):
    return torch.cat([x.mean((2, 3)), (x**2).mean((2, 3))], dim=1)


class Toy:
    """A SeedSampler that also implements SeedGradients."""

    calls_per_step, gradient_cost = 1, GradientCost(forward=20, with_gradient=20)
    references = len(REFERENCES)

    def __init__(self, steps=20):
        self.steps, self.evaluations, self.inverted, self.sessions = steps, 0, 0, 0
        self.generated, self.sampler_seeds = [], []
        self.loss = ReferenceLoss(latent_centroid(REFERENCES), embedding_centroid(embed(REFERENCES)), embed)

    def walk(self, noise, steps):
        """The latents after each step, in the scale of the losses."""
        sigmas, late = schedule(steps), []
        x = noise * (1 + sigmas[0] ** 2).sqrt()
        for now, then in itertools.pairwise(sigmas):
            self.evaluations += len(x)
            x = x + (x - denoise(x, now.expand(len(x)))) / now * (then - now)
            late.append(vp_scale(x, then))
        return late

    def generate(self, noises, steps, seeds):
        assert not torch.is_grad_enabled()
        self.generated.append((len(noises), steps))
        self.sampler_seeds += seeds
        return self.walk(noises, steps)[-1]

    def noise_of(self, seed):
        return noise_of(seed)

    def batch_size(self, count):
        return 4

    def score(self, latents):
        return self.loss(latents)

    def unroll(self, noise):
        return self.walk(noise, self.steps)[-3:]

    def to_latent(self, latent):
        return latent

    def inversions(self):
        self.inverted += 1
        sigmas = schedule(50)
        noises = [vp_scale(invert(denoise, x[None], sigmas), sigmas[0]) for x in REFERENCES]
        return dict(enumerate(noises, start=1))


def select(toy=None, **settings):
    toy = toy or Toy()
    settings.setdefault("optimize", FEW)
    return SeedSelect(SeedSelectSettings(**settings), toy), toy


def finish(run, progress=None):
    """Results of ``run``, with its parts called in the order of the node."""
    run.choose(progress)
    if run.settings.optimizes:
        run.sampler.sessions += 1
        run.optimize(run.sampler, progress)
    return run.generate(progress)


def in_full(noise, toy):
    """(latent, score) of a run with all steps from ``noise``."""
    with torch.no_grad():
        latent = Toy().generate(noise, 20, [0])
        return latent, float(toy.loss([latent]))


@pytest.mark.slow
@pytest.mark.parametrize("start", ["noise", "inversion", "centroid"])
@pytest.mark.parametrize("mode", ["search", "optimize", "search+optimize"])
@pytest.mark.parametrize("count", [1, 2])
def test_every_mode_and_start_returns_final_images_at_the_planned_cost(mode, start, count):
    run, toy = select(mode=mode, start=start, count=count, candidates=16, seed=30)
    calls = []
    results = finish(run, lambda done, total, score, latent: calls.append((done, total, score, latent())))
    assert len(results) == count
    for found in results:
        latent, score = in_full(found.noise, toy)
        assert torch.equal(found.latent, latent)
        assert found.score == score
        assert found.noise.shape == SHAPE
    assert run.best is results[0]
    assert toy.evaluations == run.evaluations == run.planned
    assert [done for done, *_ in calls] == sorted({done for done, *_ in calls})
    assert calls[-1][0] == run.planned
    assert {total for _, total, *_ in calls} == {run.planned}
    assert toy.inverted == (start != "noise")
    assert toy.sessions == ("optimize" in mode)
    assert run.report().count("image ") == count


def test_search_returns_the_seed_that_reproduces_it():
    run, toy = select(candidates=16, seed=30)
    (found,) = finish(run)
    assert toy.generated[-1] == (1, 20)
    assert 30 <= found.seed < 46
    assert torch.equal(found.noise, noise_of(found.seed))
    assert torch.equal(found.latent, in_full(noise_of(found.seed), toy)[0])


def test_search_of_64_is_near_the_best_for_an_eighth_of_the_cost():
    run, toy = select(candidates=64, seed=0)
    (found,) = finish(run)
    scores = sorted(in_full(noise_of(s), toy)[1] for s in range(64))
    assert found.score <= scores[6]
    assert toy.evaluations * 8 <= 64 * 20


def test_optimisation_lowers_the_score():
    run, toy = select(mode="optimize", seed=3, optimize=OptimizeSettings(iterations=20))
    (found,) = finish(run)
    assert found.seed == 3
    assert found.label == "seed 3, optimised"
    _, before = in_full(noise_of(3), toy)
    assert found.score < before
    assert "does not reproduce the result" in run.report()


def test_optimisation_that_finds_nothing_better_says_so_and_keeps_the_label():
    class Worse(Toy):
        def score(self, latents):
            unchanged = torch.equal(latents[-1], in_full(noise_of(3), self)[0])
            return self.loss(latents) + (0.0 if unchanged else 1e3)

    run, _ = select(Worse(), mode="optimize", seed=3)
    (found,) = finish(run)
    assert found.label == "seed 3" and torch.equal(found.noise, noise_of(3))
    report = run.report().splitlines()
    assert "seed 3 reproduces the result" in report[1]
    assert any(line.startswith("the optimisation found nothing better than the start") for line in report)
    unchanged, _ = select(mode="optimize", seed=3, optimize=OptimizeSettings(iterations=0))
    assert finish(unchanged)[0].label == "seed 3"
    assert "found nothing better" not in unchanged.report()


def test_report_begins_with_the_result_and_explains_the_two_scores():
    run, _ = select(mode="search+optimize", candidates=16, optimize=OptimizeSettings(iterations=5))
    (found,) = finish(run)
    report = run.report().splitlines()
    assert report[0] == f"image 1, {found.label}: score {found.score:.4f}"
    candidates = [k for k, line in enumerate(report) if line.startswith("1. seed")]
    assert candidates and candidates[0] > report.index(
        "the score is a distance to the references: a lower score is better"
    )
    assert run.optimizations[0].best.score != pytest.approx(found.score, abs=1e-4)
    assert sum("so their scores differ" in line for line in report) == 1
    search, _ = select(candidates=4)
    finish(search)
    assert "so their scores differ" not in search.report()


@pytest.mark.parametrize("pick", [1, 3])
def test_0_iterations_equal_the_plain_run(pick):
    unchanged = OptimizeSettings(iterations=0)
    run, toy = select(mode="optimize", seed=3, pick=pick, optimize=unchanged)
    (found,) = finish(run)
    assert torch.equal(found.noise, noise_of(2 + pick))
    assert torch.equal(found.latent, in_full(noise_of(2 + pick), toy)[0])
    both, toy = select(mode="search+optimize", candidates=16, pick=pick, optimize=unchanged)
    search, _ = select(mode="search", candidates=16, pick=pick)
    (a,), (b,) = finish(both), finish(search)
    assert torch.equal(a.noise, b.noise)
    assert torch.equal(a.latent, b.latent)
    assert (a.seed, a.score) == (b.seed, b.score)


def test_best_candidates_are_optimised():
    run, _ = select(mode="search+optimize", candidates=16, pick=2, optimized=3)
    (found,) = finish(run)
    starts = [run.search.candidates[i] for i in run.search.ranking[1:4]]
    assert [o.best.seed for o in run.optimizations] == [c.seed for c in starts]
    assert [o.start for o in run.optimizations] == starts
    best = min(run.optimizations, key=lambda o: o.best.score)
    assert torch.equal(found.noise, best.best.noise)


def test_images_start_from_noises_on_the_path_between_the_two_best():
    run, toy = select(candidates=16, count=4)
    results = finish(run)
    first, second = (run.search.candidates[i] for i in run.search.ranking[:2])
    assert torch.equal(results[0].noise, first.noise())
    assert torch.equal(results[3].noise, second.noise())
    assert [r.seed for r in results] == [first.seed, None, None, second.seed]
    path = norm_aware_path(first.noise(), second.noise())
    for share, found in ((1 / 3, results[1]), (2 / 3, results[2])):
        assert torch.equal(found.noise, path.at(share))
        assert found.label == f"{100 * share:.0f} % from {first.label} to {second.label}"
    assert [r.score for r in results] == [in_full(r.noise, toy)[1] for r in results]


@pytest.mark.slow
def test_stochastic_sampler_uses_the_seed_of_the_noise_or_the_settings():
    run, toy = select(candidates=4, seed=50, count=3)
    results = finish(run)
    best = results[0].seed
    assert toy.sampler_seeds == [50, 51, 52, 53, best, best, results[2].seed]
    assert [r.sampler_seed for r in results] == toy.sampler_seeds[4:]
    for start in ("inversion", "centroid"):
        run, toy = select(candidates=4, seed=50, start=start)
        finish(run)
        assert set(toy.sampler_seeds) == {50}
    run, toy = select(mode="optimize", seed=7)
    assert finish(run)[0].sampler_seed == 7
    assert toy.sampler_seeds == [7]


@pytest.mark.slow
def test_start_inversion_and_centroid_use_the_inverted_references():
    run, toy = select(start="inversion", candidates=16)
    (found,) = finish(run)
    inverted = toy.inversions()
    assert found.label in ("reference 1", "reference 2")
    assert found.seed is None
    assert torch.equal(found.noise, inverted[int(found.label[-1])])
    centroid, _ = norm_aware_centroid(list(inverted.values()))
    run, _ = select(mode="optimize", start="centroid", optimize=OptimizeSettings(iterations=0))
    assert torch.equal(finish(run)[0].noise, centroid)


def test_inverted_reference_scores_better_than_most_seeds():
    run, toy = select(start="inversion", candidates=2)
    (found,) = finish(run)
    scores = sorted(in_full(noise_of(s), toy)[1] for s in range(20))
    assert found.score < scores[5]


def test_centroid_candidates_lie_on_paths_to_the_seeds():
    seeds = {1: noise_of(1), 4: noise_of(2), 5: noise_of(3)}  # references 2 and 3 were left out
    centroid, paths = norm_aware_centroid(list(seeds.values()))
    candidates = centroid_candidates(seeds, 7)
    assert [c.label for c in candidates] == [
        "centroid",
        *(f"50 % from the centroid to reference {k}" for k in (1, 4, 5)),
        *(f"100 % from the centroid to reference {k}" for k in (1, 4, 5)),
    ]
    expected = [centroid, *(p.at(0.5) for p in paths), *seeds.values()]
    assert all(torch.equal(c.noise(), noise) for c, noise in zip(candidates, expected, strict=True))
    assert len(centroid_candidates(seeds, 1)) == 1
    assert [c.label[:2] for c in centroid_candidates(seeds, 6)] == ["ce", "50", "50", "50", "10", "10"]


@pytest.mark.slow
def test_interrupt_at_any_time_keeps_the_best():
    class Interrupt(Exception):
        pass

    whole, toy = select(mode="search+optimize", candidates=16, count=2)
    marks = []
    finish(whole, lambda done, total, score, latent: marks.append((done, score)))
    for done, score in marks:
        run, _ = select(mode="search+optimize", candidates=16, count=2)

        def progress(now, *_, at=done):
            if now == at:
                raise Interrupt

        assert run.best is None
        with pytest.raises(Interrupt):
            finish(run, progress)
        assert run.evaluations == done
        assert run.best is not None
        if not run.optimizations:
            assert run.best.score == score
        elif not run.results:
            assert run.best.score == min(o.best.score for o in run.optimizations)
        assert run.series()
        best, spent, made = run.best, run.evaluations, len(run.results)
        results = run.finish_interrupted()
        assert results is run.results and len(results) == max(made, 1)
        assert torch.equal(results[0].noise, best.noise)
        latent, score = in_full(best.noise, toy)
        assert torch.equal(results[0].latent, latent) and results[0].score == score
        finished = made or (run.search.done and not run.optimizations)
        assert run.evaluations == spent + 20 * (not finished)
        reproduces = torch.equal(best.noise, noise_of(best.seed))
        text = "reproduces the result in" if reproduces else "does not reproduce the result"
        assert f"seed {best.seed} " in run.report() and text in run.report()


def test_interrupt_in_the_last_round_keeps_the_pick():
    class Interrupted(Toy):
        def generate(self, noises, steps, seeds):
            if steps == 20 and not self.interrupted:
                self.interrupted = True
                raise InterruptedError
            return super().generate(noises, steps, seeds)

    toy = Interrupted()
    toy.interrupted = False
    run, _ = select(toy, candidates=16, pick=3)
    with pytest.raises(InterruptedError):
        finish(run)
    assert run.best.seed == run.search.ranking[2]
    [result] = run.finish_interrupted()
    assert result.seed == run.search.ranking[2]
    whole, _ = select(candidates=16, pick=3)
    assert torch.equal(result.latent, finish(whole)[0].latent)


def test_finishing_after_a_complete_search_costs_nothing():
    run, toy = select(candidates=4)
    pool = run._pool()
    run._plan(pool)
    found = run.search.run()
    spent = run.evaluations
    assert run.finish_interrupted()[0].latent is found.latent
    assert run.evaluations == toy.evaluations == spent


def test_each_score_series_begins_after_the_end_of_the_previous_one():
    run, _ = select(mode="search+optimize", candidates=16, optimized=2)
    finish(run)
    labels, ends = [s.label for s in run.series()], [(s.evaluations[0], s.evaluations[-1]) for s in run.series()]
    assert labels[:3] == ["16 candidates, 1 step", "4 candidates, 4 steps", "1 candidate, 20 steps"]
    assert labels[3:] == [f"{o.start.label}, optimised" for o in run.optimizations]
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ends))
    assert ends[-1][1] == run.evaluations - 20  # the run of the final image comes last


@pytest.mark.slow
def test_runs_in_inference_mode():
    expected = finish(select(mode="search+optimize", start="centroid", candidates=4, count=3)[0])
    with torch.inference_mode():
        results = finish(select(mode="search+optimize", start="centroid", candidates=4, count=3)[0])
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a.noise, b.noise)
        assert torch.equal(a.latent, b.latent)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(mode="anneal"), "mode 'anneal' is unknown; use one of search, optimize, search"),
        (dict(start="mean"), "start 'mean' is unknown; use one of noise, inversion, centroid"),
        (dict(candidates=0), "candidates 0 is less than 1"),
        (dict(candidates=5000), "candidates 5000 is not between 1 and 4096"),
        (dict(count=0), "count 0 is less than 1"),
        (dict(steps=0), "steps 0 is less than 1"),
        (dict(pick=0), "pick 0 is less than 1"),
        (
            dict(pick=17),
            "at least 17 candidates to select 1 noise starting at pick 17, got 16; raise candidates, or lower pick",
        ),
        (dict(candidates=1, count=2), "at least 2 candidates to select 2 noises starting at pick 1, got 1"),
        (dict(mode="search+optimize", optimized=4, candidates=3), "expected at least 4 candidates to select 4 noises"),
        (dict(first_steps=30), "first_steps 30 is not between 1 and steps 20"),
        (dict(survivors=0.9), "survivors must be above 0 and at most 0.5, got 0.9"),
        (dict(share=2, shares=2), "share 2 is not between 0 and 1 for shares 2; number the machines from 0"),
        (dict(shares=2, start="centroid"), "shares 2 needs start noise, since the candidates of start centroid come"),
        (
            dict(seeds=(3, 4), start="inversion"),
            "the list in seeds needs start noise, since the candidates of start inv",
        ),
        (dict(seeds=(3, 4, 3), pick=3), "at least 3 seeds to select 1 noise starting at pick 3, got 2; add seeds, or"),
        (dict(seeds=(3,), mode="optimize", pick=2), "at least 2 seeds to select 1 noise starting at pick 2, got 1"),
    ],
    ids=str,
)
def test_invalid_settings_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        SeedSelectSettings(**settings)


def searched(run):
    return [c.seed for c in run.search.candidates]


@pytest.mark.parametrize("shares", [2, 3])
def test_machines_search_different_seeds_and_find_the_best_of_one_machine(shares):
    exact = dict(steps=5, first_steps=5, seed=2**64 - 7)  # no candidate is dropped before all steps; seeds wrap around
    whole, _ = select(candidates=12, **exact)
    finish(whole)
    parts = [select(candidates=12 // shares, share=k, shares=shares, **exact)[0] for k in range(shares)]
    best = min((finish(part)[0] for part in parts), key=lambda result: result.score)
    assert [searched(part) for part in parts] == [searched(whole)[k::shares] for k in range(shares)]
    assert best.seed == whole.best.seed and torch.equal(best.latent, whole.best.latent)
    line = f"share 1 of {shares} shares, counted from 0: seeds from {2**64 - 6} in steps of {shares}"
    assert line in parts[1].report().splitlines()
    assert "shares" not in whole.report()


def test_machines_with_different_numbers_of_candidates_search_different_seeds():
    parts = [select(candidates=number, share=k, shares=2)[0] for k, number in enumerate((9, 3))]
    for part in parts:
        part.choose()
    assert [searched(part) for part in parts] == [[0, 2, 4, 6, 8, 10, 12, 14, 16], [1, 3, 5]]


def test_machines_optimise_different_seeds():
    starts = [select(mode="optimize", share=k, shares=2, seed=5, pick=2, optimized=2)[0] for k in range(2)]
    for run in starts:
        run.choose()
    assert [[c.seed for c in run.chosen] for run in starts] == [[7, 9], [8, 10]]


def test_listed_seeds_are_searched_once_in_place_of_the_others():
    run, _ = select(seeds=(40, 7, 40, 12), seed=1, candidates=30, share=1, shares=2, steps=5, first_steps=5)
    finish(run)
    assert searched(run) == [40, 7, 12]
    scores = {seed: in_steps(seed, run.sampler, 5) for seed in (40, 7, 12)}
    assert run.best.seed == min(scores, key=scores.get)
    assert "candidates: 3 listed seeds (1 repetition left out); seed, candidates and share are not used" in run.report()


def in_steps(seed, toy, steps):
    with torch.no_grad():
        return float(toy.loss([Toy().generate(noise_of(seed), steps, [0])]))


def test_single_listed_seed_is_the_result():
    run, _ = select(seeds=(9,), seed=1)
    (result,) = finish(run)
    assert result.seed == 9 and torch.equal(result.noise, noise_of(9))
    assert "candidates: 1 listed seed; seed, candidates and share are not used" in run.report()


def test_optimisation_starts_from_the_listed_seed_of_number_pick():
    run, _ = select(mode="optimize", seeds=(9, 4, 6), pick=2, optimized=2)
    run.choose()
    assert [c.seed for c in run.chosen] == [4, 6]


def test_missing_gradients_and_too_few_references_rejected():
    toy = Toy()
    toy.gradient_cost = None
    with pytest.raises(ValueError, match="mode optimize needs a differentiable sampler; use mode search"):
        select(toy, mode="optimize")
    one = Toy()
    one.references = 1
    with pytest.raises(ValueError, match="start centroid needs at least 2 references, got 1; connect more"):
        finish(select(one, start="centroid")[0])
    for settings in (dict(pick=2), dict(count=2)):
        with pytest.raises(
            ValueError, match=r"expected at least 2 references for start inversion .*, got 1; add references"
        ):
            finish(select(one, start="inversion", **settings)[0])
    assert not one.inverted  # an inversion takes long


def test_non_finite_score_of_an_image_rejected():
    toy = Toy()
    toy.generate = lambda noises, steps, seeds: noises * math.nan
    with pytest.raises(ValueError, match="the score of seed 3, optimised is nan"):
        finish(select(toy, mode="optimize", seed=3)[0])
    with pytest.raises(ValueError, match="the score of seed 0 is nan with 1 step;"):
        finish(select(toy)[0])
