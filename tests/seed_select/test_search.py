"""Successive halving on scores with a known order, and its cost."""

import math

import pytest
import torch

from chorus.techniques.seed_select.records import ScoreSeries, seed_candidates
from chorus.techniques.seed_select.search import Round, RoundScores, SeedSearch, plan_search

SHAPE = (1, 4, 2, 2)


def noise_of(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


class Model:
    """Fake model: its latent is the noise with the number of steps in one element; a score depends on (seed, steps)."""

    def __init__(self, score=lambda seed, steps: float(seed)):
        self.table, self.calls, self.sampler_seeds = score, [], []
        self.seeds = {noise_of(s).flatten()[0].item(): s for s in range(200)}

    def generate(self, noises, steps, seeds):
        self.calls.append((len(noises), steps))
        self.sampler_seeds.append([self.seeds[z.flatten()[0].item()] for z in noises] == list(seeds))
        latents = noises.clone()
        latents[:, 1, 1, 1] = steps
        return latents

    def score(self, latents):
        (x,) = latents
        return torch.tensor([self.table(self.seeds[z.flatten()[0].item()], int(z[1, 1, 1])) for z in x])


def search(model, candidates=64, steps=20, first=0, pick=1, batch=8, **options):
    plan = plan_search(candidates, steps, **options)
    return SeedSearch(seed_candidates(first, candidates, noise_of), model, plan, pick=pick, batch=batch)


def shuffled(seed, steps=1):
    """Scores whose order is unrelated to the seeds."""
    return float((seed * 37 + 11) % 101)


def test_plan_of_64_candidates_costs_an_eighth():
    plan = plan_search(64, 20)
    assert plan.rounds == (Round(64, 1), Round(16, 3), Round(4, 7), Round(1, 20))
    assert plan.evaluations == 64 + 48 + 28 + 20 == 160
    assert plan.best_of_all == 64 * 20
    assert plan.evaluations * 8 <= plan.best_of_all


@pytest.mark.parametrize("survivors", [0.1, 0.25, 1 / 3, 0.5])
@pytest.mark.parametrize("first_steps", [1, 3])
def test_every_plan_increases_steps_and_decreases_candidates(survivors, first_steps):
    for candidates in (1, 2, 3, 4, 5, 16, 17, 100):
        for steps in (3, 4, 20, 50):
            rounds = plan_search(candidates, steps, first_steps=first_steps, survivors=survivors).rounds
            counts, lengths = [r.candidates for r in rounds], [r.steps for r in rounds]
            assert rounds[-1] == Round(1, steps)
            assert counts[0] == candidates
            assert candidates == 1 or lengths[0] == first_steps
            assert counts == sorted(set(counts), reverse=True) or counts == [1]
            assert lengths[:-1] == sorted(set(lengths[:-1]))
            assert max(lengths) == steps


def test_rounds_with_equal_steps_are_omitted():
    assert plan_search(64, 1).rounds == (Round(64, 1), Round(1, 1))
    assert plan_search(64, 2).rounds == (Round(64, 1), Round(4, 2), Round(1, 2))


def test_second_order_samplers_cost_twice():
    assert plan_search(64, 20, calls_per_step=2).evaluations == 320


def test_cost_and_progress_match_the_plan():
    model, progress = Model(shuffled), []
    run = search(model)
    run.run(lambda done, total, score, latent: progress.append((done, total, score, latent())))
    assert sum(count * steps for count, steps in model.calls) == run.plan.evaluations == run.evaluations == 160
    assert model.calls == [(8, 1)] * 8 + [(8, 3)] * 2 + [(4, 7), (1, 20)]
    assert [done for done, *_ in progress] == [8 * k for k in range(1, 9)] + [88, 112, 140, 160]
    assert {total for _, total, *_ in progress} == {160}
    for _, _, score, latent in progress:
        assert float(model.score([latent])) == score


def test_best_candidates_survive():
    model = Model(shuffled)
    run = search(model, candidates=64)
    found = run.run()
    order = sorted(range(64), key=shuffled)
    for scores, kept in zip(run.rounds, (64, 16, 4, 1)):
        assert sorted(scores.scores) == sorted(order[:kept])
        assert all(score == shuffled(i) for i, score in scores.scores.items())
    assert run.ranking[:4] == tuple(order[:4])
    assert all(model.sampler_seeds)
    assert (found.seed, found.score) == (order[0], shuffled(order[0]))
    assert torch.equal(found.noise, noise_of(order[0]))
    assert torch.equal(found.latent, model.generate(noise_of(order[0]), 20, [order[0]]))


def test_a_later_round_decides_by_its_own_scores():
    """With 1 step scores rise with the seed; with more steps they fall, so the last of the 16 survivors is the best."""
    model = Model(lambda seed, steps: float(seed if steps == 1 else -seed))
    run = search(model)
    assert run.run().seed == 15
    assert run.ranking == (15, 14, 13, 12, *range(11, -1, -1), *range(16, 64))


def test_ranking_is_by_round_then_by_score():
    model = Model(lambda seed, steps: float(seed + 1000 * steps))
    run = search(model, candidates=16, steps=20)
    run.run()
    assert run.ranking == tuple(range(16))
    assert [run.last_score(i)[0] for i in run.ranking][:5] == [4000.0 + 16000, 4001.0, 4002.0, 4003.0, 1004.0]


def test_ties_rank_the_earlier_candidate_first():
    run = search(Model(lambda seed, steps: 0.5), first=7)
    assert run.run().seed == 7
    assert run.ranking == tuple(range(64))


@pytest.mark.parametrize("pick", [1, 2, 4, 5, 17, 64])
def test_pick_selects_by_rank_without_changing_the_ranking(pick):
    model = Model(shuffled)
    first = search(model)
    first.run()
    run = search(model, pick=pick)
    found = run.run()
    assert run.ranking == first.ranking
    assert found.seed == run.candidates[first.ranking[pick - 1]].seed
    assert run.best.seed == found.seed
    assert model.calls[-1] == (1, 20)
    assert int(found.latent[0, 1, 1, 1]) == 20


def test_one_candidate_is_sampled_once():
    model = Model()
    run = search(model, candidates=1, first=5)
    assert run.run().seed == 5
    assert model.calls == [(1, 20)]


def test_batch_size_changes_only_the_calls():
    runs = []
    for batch in (1, 5, 64):
        model = Model(shuffled)
        run = search(model, batch=batch)
        run.run()
        assert max(count for count, _ in model.calls) == batch
        runs.append(([(r.steps, sorted(r.scores.items())) for r in run.rounds], run.ranking, run.evaluations))
    assert runs[0] == runs[1] == runs[2]


def test_interrupted_search_has_a_best_result():
    class Interrupt(Exception):
        pass

    def stop(at):
        def progress(done, total, score, latent):
            if done >= at:
                raise Interrupt

        return progress

    assert search(Model(shuffled)).best is None
    order = sorted(range(64), key=shuffled)
    for at, best in ((8, min(range(8), key=shuffled)), (64, order[0]), (88, order[0]), (140, order[0])):
        run = search(Model(shuffled))
        with pytest.raises(Interrupt):
            run.run(stop(at))
        assert run.evaluations == at
        assert run.best.seed == best
        assert run.best.score == shuffled(best)
        assert not run.done


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("steps", "seed"), [(1, 42), (3, 3), (20, 0)])
def test_non_finite_score_error_names_the_seed(value, steps, seed):
    run = search(Model(lambda s, n: value if (s, n) == (seed, steps) else float(s)))
    with pytest.raises(ValueError, match=f"the score of seed {seed} is {value} with {steps} steps?; check that"):
        run.run()


def test_wrong_number_of_scores_rejected():
    model = Model()
    model.score = lambda latents: torch.zeros(3)
    with pytest.raises(ValueError, match="got 8 latents and 3 scores"):
        search(model).run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(candidates=0), "candidates 0 is not between 1 and 4096"),
        (dict(candidates=5000), "candidates 5000 is not between 1 and 4096"),
        (dict(steps=0), "steps 0 is less than 1"),
        (dict(first_steps=0), "first_steps 0 is not between 1 and steps 20"),
        (dict(first_steps=21), "first_steps 21 is not between 1 and steps 20"),
        (dict(survivors=0.6), "survivors must be above 0 and at most 0.5, got 0.6"),
        (dict(survivors=0.0), "survivors must be above 0 .*got 0"),
        (dict(survivors=math.nan), "survivors must be above 0 .*got nan"),
        (dict(pick=0), "pick 0 is not between 1 and 64, the number of candidates"),
        (dict(pick=65), "pick 65 is not between 1 and 64"),
        (dict(batch=0), "batch 0 is less than 1"),
    ],
    ids=str,
)
def test_invalid_search_settings_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        search(Model(), **options)


def test_plan_for_another_number_of_candidates_rejected():
    with pytest.raises(ValueError, match="3 candidates do not fit a plan for 64"):
        SeedSearch(seed_candidates(0, 3, noise_of), None, plan_search(64, 20))


def test_seeds_stay_below_2_to_the_64():
    last = 2**64 - 1
    assert [c.seed for c in seed_candidates(last, 3, noise_of)] == [last, 0, 1]
    assert [c.label for c in seed_candidates(5, 2, noise_of)] == ["seed 5", "seed 6"]


def test_series_are_scores_over_evaluations():
    run = search(Model(shuffled), candidates=16, batch=4)
    run.run()
    series = run.series()
    assert [s.label for s in series] == ["16 candidates, 1 step", "4 candidates, 4 steps", "1 candidate, 20 steps"]
    assert series[0].evaluations == (4,) * 4 + (8,) * 4 + (12,) * 4 + (16,) * 4
    assert series[0].scores == tuple(shuffled(s) for s in range(16))
    assert series[2].evaluations == (16 + 16 + 20,)
    assert ScoreSeries("", (1, 2, 3, 4), (3.0, 5.0, 2.0, 2.5)).best == (3.0, 3.0, 2.0, 2.0)


def test_lines_name_rank_seed_score_and_steps():
    run = search(Model(), candidates=4, first=3)
    run.run()
    assert run.lines() == [
        "1. seed 3: 3.0000 with 20 steps",
        "2. seed 4: 4.0000 with 1 step",
        "3. seed 5: 5.0000 with 1 step",
        "4. seed 6: 6.0000 with 1 step",
    ]


def test_ranking_is_stable():
    assert RoundScores(1, {4: 1.0, 2: 0.5, 3: 1.0, 1: 0.5}).ranking == (1, 2, 3, 4)
