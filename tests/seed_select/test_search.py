"""Successive halving on scores whose order is known, and the plan of what it spends."""

import math

import pytest
import torch

from chorus.techniques.seed_select.records import ScoreSeries, seed_candidates
from chorus.techniques.seed_select.search import Round, RoundScores, SeedSearch, plan_search

SHAPE = (1, 4, 2, 2)


def noise_of(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


class Model:
    """A picture is its noise with the steps in one place; the score is a table of (seed, steps), counted as it is asked."""

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
    """An order of the candidates that has nothing to do with their seeds."""
    return float((seed * 37 + 11) % 101)


def test_the_plan_of_64_candidates_spends_an_eighth():
    plan = plan_search(64, 20)
    assert plan.rounds == (Round(64, 1), Round(16, 3), Round(4, 7), Round(1, 20))
    assert plan.evaluations == 64 + 48 + 28 + 20 == 160
    assert plan.best_of_all == 64 * 20
    assert plan.evaluations * 8 <= plan.best_of_all


@pytest.mark.parametrize("survivors", [0.1, 0.25, 1 / 3, 0.5])
@pytest.mark.parametrize("first_steps", [1, 3])
def test_plans_of_all_sizes(survivors, first_steps):
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


def test_rounds_of_the_same_steps_are_not_run_twice():
    assert plan_search(64, 1).rounds == (Round(64, 1), Round(1, 1))
    assert plan_search(64, 2).rounds == (Round(64, 1), Round(4, 2), Round(1, 2))


def test_second_order_samplers_cost_twice():
    assert plan_search(64, 20, calls_per_step=2).evaluations == 320


def test_the_search_spends_what_the_plan_says_and_tells_it():
    model, told = Model(shuffled), []
    run = search(model)
    run.run(lambda done, total, score, picture: told.append((done, total, score, picture())))
    assert sum(count * steps for count, steps in model.calls) == run.plan.evaluations == run.evaluations == 160
    assert model.calls == [(8, 1)] * 8 + [(8, 3)] * 2 + [(4, 7), (1, 20)]
    assert [done for done, *_ in told] == [8 * k for k in range(1, 9)] + [88, 112, 140, 160]
    assert {total for _, total, *_ in told} == {160}
    for _, _, score, picture in told:
        assert float(model.score([picture])) == score


def test_the_best_candidates_stay():
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
    """Scores of 1 step order by seed; with more steps the order turns around: the best of the first 16 wins."""
    model = Model(lambda seed, steps: float(seed if steps == 1 else -seed))
    run = search(model)
    assert run.run().seed == 15
    assert run.ranking == (15, 14, 13, 12, *range(11, -1, -1), *range(16, 64))


def test_who_came_further_ranks_before_who_scored_lower():
    model = Model(lambda seed, steps: float(seed + 1000 * steps))
    run = search(model, candidates=16, steps=20)
    run.run()
    assert run.ranking == tuple(range(16))
    assert [run.last_score(i)[0] for i in run.ranking][:5] == [4000.0 + 16000, 4001.0, 4002.0, 4003.0, 1004.0]


def test_ties_go_to_the_earlier_candidate():
    run = search(Model(lambda seed, steps: 0.5), first=7)
    assert run.run().seed == 7
    assert run.ranking == tuple(range(64))


@pytest.mark.parametrize("pick", [1, 2, 4, 5, 17, 64])
def test_pick_counts_in_the_ranking_and_leaves_it_as_it_is(pick):
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


def test_one_candidate_is_one_plain_run():
    model = Model()
    run = search(model, candidates=1, first=5)
    assert run.run().seed == 5
    assert model.calls == [(1, 20)]


def test_the_batch_changes_nothing_but_the_calls():
    runs = []
    for batch in (1, 5, 64):
        model = Model(shuffled)
        run = search(model, batch=batch)
        run.run()
        assert max(count for count, _ in model.calls) == batch
        runs.append(([(r.steps, sorted(r.scores.items())) for r in run.rounds], run.ranking, run.evaluations))
    assert runs[0] == runs[1] == runs[2]


def test_an_interrupted_search_has_its_best():
    class Interrupt(Exception):
        pass

    def stop(at):
        def progress(done, total, score, picture):
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
def test_a_score_that_is_not_finite_names_the_seed(value, steps, seed):
    run = search(Model(lambda s, n: value if (s, n) == (seed, steps) else float(s)))
    with pytest.raises(ValueError, match=f"the score of seed {seed} is {value} with {steps} steps?; check that"):
        run.run()


def test_models_that_answer_for_another_number_are_refused():
    model = Model()
    model.score = lambda latents: torch.zeros(3)
    with pytest.raises(ValueError, match="8 candidates gave 8 latents and 3 scores"):
        search(model).run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(candidates=0), "candidates 0 is not in 1 to 4096"),
        (dict(candidates=5000), "candidates 5000 is not in 1 to 4096"),
        (dict(steps=0), "steps 0 is less than 1"),
        (dict(first_steps=0), "first_steps 0 is not in 1 to steps 20"),
        (dict(first_steps=21), "first_steps 21 is not in 1 to steps 20"),
        (dict(survivors=0.6), "survivors 0.6 is not above 0 and at most 0.5"),
        (dict(survivors=0.0), "survivors 0 is not above 0"),
        (dict(survivors=math.nan), "survivors nan is not above 0"),
        (dict(pick=0), "pick 0 is not in 1 to 64, the number of candidates"),
        (dict(pick=65), "pick 65 is not in 1 to 64"),
        (dict(batch=0), "batch 0 is less than 1"),
    ],
    ids=str,
)
def test_searches_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        search(Model(), **options)


def test_a_plan_for_others_is_refused():
    with pytest.raises(ValueError, match="3 candidates do not fit a plan for 64"):
        SeedSearch(seed_candidates(0, 3, noise_of), None, plan_search(64, 20))


def test_seeds_stay_below_2_to_the_64():
    last = 2**64 - 1
    assert [c.seed for c in seed_candidates(last, 3, noise_of)] == [last, 0, 1]
    assert [c.label for c in seed_candidates(5, 2, noise_of)] == ["seed 5", "seed 6"]


def test_series_are_the_scores_over_what_was_spent():
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


def test_a_ranking_is_stable():
    assert RoundScores(1, {4: 1.0, 2: 0.5, 3: 1.0, 1: 0.5}).ranking == (1, 2, 3, 4)
