"""The search of TuneBlend, on functions whose minimum is known."""

import math
import zlib

import numpy as np
import pytest

from chorus.techniques.saliency_blend.tuning import Tuning, plan_tuning
from chorus.techniques.saliency_blend.tuning_space import Limits, read_space

LIMITS = {
    "bias": Limits(-5.0, 5.0, 0.05),
    "start_percent": Limits(0.0, 1.0, 0.001),
    "end_percent": Limits(0.0, 1.0, 0.001),
    "mask_refresh": Limits(1, 100, 1, whole=True),
    "saliency": Limits(options=("own", "shared")),
}
SPACE = read_space(
    "bias = -2 to 2\nstart_percent = 0 to 0.4\nend_percent = 0.6 to 1\nmask_refresh = 1 | 100", ["a"], LIMITS
)
START, KNOWN = (0.0, 0.0, 1.0, 1), (0.5, 0.2, 0.9, 100)
STEPS = 20


class Bowl:
    """Images fail more often the farther the settings are from ``centre``; the scores of single images are noisy."""

    def __init__(self, centre, key=0, width=0.3):
        self.centre, self.key, self.width, self.calls = centre, key, width, []

    def exact(self, point):
        """The expected score."""
        places = zip(SPACE, point, self.centre, strict=True)
        square = sum(((s.place(v) - c) / self.width) ** 2 for s, v, c in places)
        return 0.35 + 0.35 * (1.0 - 0.8 * math.exp(-0.5 * square))

    def __call__(self, point, steps, seeds):
        self.calls.append((point, steps, seeds))
        failing, found = (self.exact(point) - 0.35) / 0.35, []
        for seed in seeds:
            of_seed, of_image = (
                np.random.default_rng([self.key, seed, *k]) for k in ((), (zlib.crc32(repr(point).encode()),))
            )
            # two of five images fail or not by their seed, the others by chance
            draw = of_seed.random() if of_image.random() < 0.4 else of_image.random()
            found.append(0.35 + 0.35 * (draw < failing) + 0.04 * of_image.normal() + 0.05 * (steps < STEPS))
        return found


def cost_of(calls):
    return sum(len(seeds) * used / STEPS for _, used, seeds in calls)


def run(bowl, cost=64, seeds=4, seed=0, known=()):
    search = Tuning(SPACE, START, plan_tuning(cost, STEPS, seeds), bowl, seed, known)
    search.run()
    return search


def test_search_finds_better_settings_than_random_search_at_the_same_cost():
    """On 20 functions, the mean expected score of the settings found; random search takes the best of 16 candidates."""
    tuned, drawn = [], []
    for number in range(20):
        random = np.random.default_rng(number)
        bowl = Bowl([*random.random(3), 0.75], number)
        search = run(bowl, seed=number)
        assert cost_of(bowl.calls) <= 64
        tuned.append(bowl.exact(search.best.point))
        points = [START, *(tuple(s.at(u) for s, u in zip(SPACE, random.random(4))) for _ in range(15))]
        drawn.append(bowl.exact(min(points, key=lambda point: math.fsum(bowl(point, STEPS, range(4))))))
    assert np.mean(tuned) < np.mean(drawn) - 0.02


def test_known_settings_are_scored_first_and_the_best_of_them_is_found():
    bowl = Bowl([s.place(v) for s, v in zip(SPACE, KNOWN)], width=0.1)
    search = run(bowl, known=[KNOWN, START])
    assert [call[0] for call in bowl.calls[:2]] == [START, KNOWN]
    assert all(seeds == range(4) for _, _, seeds in bowl.calls[:2])
    assert bowl.exact(search.best.point) < bowl.exact(START) - 0.1


def test_nothing_worse_than_the_connected_settings_is_returned():
    def exact(point):
        return 0.1 + sum((s.place(a) - s.place(b)) ** 2 for s, a, b in zip(SPACE, point, START))

    search = Tuning(SPACE, START, plan_tuning(64, STEPS, 4), lambda point, steps, seeds: [exact(point)] * len(seeds))
    assert exact(search.run().point) < 0.1 + 0.02  # the range is 0.1 to 3


@pytest.mark.parametrize(("cost", "seeds"), [(2, 1), (8, 4), (9, 3), (16, 1), (64, 4), (100, 7)])
def test_cost_is_never_exceeded_and_is_used(cost, seeds):
    bowl = Bowl([0.3] * 4)
    search = run(bowl, cost, seeds, known=[KNOWN])
    assert cost_of(bowl.calls) == pytest.approx(search.spent)
    assert search.spent <= cost + 1e-9
    assert search.spent > cost - 2 * seeds
    assert all(len(t.scores) == seeds for t in search.finished)
    assert START in [t.point for t in search.finished]


def test_first_round_uses_all_seeds_in_turn_and_few_steps():
    bowl = Bowl([0.3] * 4)
    search = run(bowl, seeds=8)
    plan = search.plan
    assert len(search.screened) == plan.screened > 10
    calls = [call for call in bowl.calls if call[1] < STEPS]
    assert {call[1] for call in calls} == {plan.few_steps}
    assert {seed for call in calls for seed in call[2]} == set(range(8))


def test_a_candidate_gets_the_other_half_of_the_seeds_only_if_it_is_worth_it():
    bowl = Bowl([0.3] * 4)
    search = run(bowl)
    halves = [call for call in bowl.calls[1:] if call[1] == STEPS]
    assert {len(seeds) for _, _, seeds in halves} == {2}
    counts = {len(t.scores) for t in search.trials}
    assert counts == {2, 4}


def test_same_seed_same_search():
    first, again, other = (run(Bowl([0.3] * 4), seed=s) for s in (1, 1, 2))
    assert [t.point for t in first.trials] == [t.point for t in again.trials]
    assert [t.point for t in first.screened] != [t.point for t in other.screened]


def test_a_small_space_is_tried_completely_and_then_the_search_ends():
    space = read_space("mask_refresh = 1 | 20\nsaliency = own | shared", ["a"], LIMITS)
    seen = []

    def score(point, steps, seeds):
        seen.append(point)
        return [0.5 - 0.1 * (point == (20, "shared"))] * len(seeds)

    search = Tuning(space, (1, "own"), plan_tuning(1000, STEPS, 4), score)
    assert search.run().point == (20, "shared")
    assert set(seen) == {(1, "own"), (1, "shared"), (20, "own"), (20, "shared")}
    assert search.spent < 100


def test_an_interrupted_search_keeps_the_best_so_far():
    bowl, calls = Bowl([0.3] * 4), []

    def stop():
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt

    search = Tuning(SPACE, START, plan_tuning(64, STEPS, 4), bowl)
    with pytest.raises(KeyboardInterrupt):
        search.run(stop)
    assert search.best is search.finished[0]
    assert len(bowl.calls) == 40


def test_scores_that_are_not_finite_stop_the_search():
    with pytest.raises(ValueError, match="the score of a candidate is nan"):
        Tuning(SPACE, START, plan_tuning(64, STEPS, 4), lambda *_: [math.nan] * 4).run()


@pytest.mark.parametrize(
    ("cost", "steps", "seeds", "message"),
    [(7, 20, 4, "7 evaluations are not enough for two candidates with 4 seeds; use at least 8"), (8, 0, 1, "0 steps")],
)
def test_plans_without_enough_cost_are_refused(cost, steps, seeds, message):
    with pytest.raises(ValueError, match=message):
        plan_tuning(cost, steps, seeds)
