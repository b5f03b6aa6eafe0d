"""The optimisation of a noise on models whose minimum is known, and against the authors' loop."""

import math
from dataclasses import replace

import pytest
import torch

from chorus.techniques.seed_select.optimize import OptimizeSettings, SeedOptimization
from chorus.techniques.seed_select.prior import chi_shell, onto_shell
from chorus.techniques.seed_select.records import Candidate
from chorus.techniques.seed_select.sampler import GradientCost

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (1, 4, 8, 8)
AUTHORS = OptimizeSettings(shell_width=math.inf, patience=0)


def draw(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


class Toy:
    """A picture that bends the noise; its score is the distance to a picture that another noise gives."""

    def __init__(self, target=9):
        self.target, self.gradients = self.picture(draw(target)), []

    def picture(self, noise):
        return torch.sinh(noise / 2) * 2

    def unroll(self, noise):
        self.gradients.append(torch.is_grad_enabled())
        return [self.picture(noise) * 0.9, self.picture(noise)]

    def to_latent(self, latent):
        return latent

    def score(self, latents):
        return ((latents[-1] - self.target) ** 2).flatten(1).mean(1)


def optimization(toy=None, settings=AUTHORS, start=None, label="start", cost=None):
    toy = toy or Toy()
    start = draw() if start is None else start
    return SeedOptimization(Candidate(label, lambda: start, 5, 6), toy, settings, cost)


def authors_loop(toy, start, iterations=30, rate=0.1):
    """Scores of the authors' optimize_seed, and of the noise after its last step."""
    noise, scores = torch.nn.Parameter(start.clone()), []
    adam = torch.optim.AdamW([noise], lr=rate)
    for i in range(iterations):
        if i == 3:
            for group in adam.param_groups:
                group["lr"] = rate / 10
        adam.zero_grad()
        loss = toy.score(toy.unroll(noise)).sum()
        scores.append(float(loss.detach()))
        loss.backward()
        adam.step()
    return [*scores, float(toy.score(toy.unroll(noise)).detach())], noise.detach()


@pytest.mark.parametrize("rate", [0.1, 0.05])
def test_the_defaults_are_the_authors_loop(rate):
    run = optimization(settings=replace(AUTHORS, learning_rate=rate))
    found = run.run()
    scores, noise = authors_loop(Toy(), draw(), rate=rate)
    assert run.scores == scores
    assert found.score == min(scores) < 0.7 * scores[0]
    assert found.score == scores[-1]
    assert torch.equal(found.noise, noise)
    assert (OptimizeSettings().iterations, OptimizeSettings().learning_rate) == (30, 0.1)


def test_it_finds_the_minimum():
    settings = replace(AUTHORS, iterations=600, full_rate_iterations=400, weight_decay=0.0)
    run = optimization(settings=settings)
    found = run.run()
    assert found.score < 1e-6
    torch.testing.assert_close(found.noise, draw(9), rtol=0, atol=0.01)


def test_the_best_iterate_is_kept_not_the_last():
    run = optimization(settings=replace(AUTHORS, learning_rate=3.0, full_rate_iterations=100), start=draw(9) * 1.05)
    found = run.run()
    assert run.scores[-1] > found.score == min(run.scores)
    assert run.scores[run.best_iteration] == found.score
    toy = Toy()
    assert float(toy.score(toy.unroll(found.noise))) == found.score
    assert torch.equal(found.latent, toy.picture(found.noise))
    assert run.norms[run.best_iteration] == pytest.approx(float(found.noise.norm()), rel=1e-6)


def test_no_better_iterate_gives_the_start_bit_for_bit():
    start = draw(9)
    found = optimization(settings=AUTHORS, start=start).run()
    assert found.noise is start
    assert found.score == 0.0


def test_0_iterations_give_the_start_bit_for_bit_without_a_gradient():
    for start in (draw(), draw() * 7):
        toy, before = Toy(), start.clone()
        run = optimization(toy, OptimizeSettings(iterations=0), start)
        found = run.run()
        assert found.noise is start
        assert torch.equal(start, before)
        assert toy.gradients == [False]
        assert run.scores == [found.score]


def test_the_start_is_not_changed():
    start = draw()
    optimization(start=start).run()
    assert torch.equal(start, draw())


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.4])
@pytest.mark.parametrize("width", [0.5, 3.0])
def test_the_norm_guard_holds_the_norm_in_the_shell(scale, width):
    toy = Toy()
    toy.target = toy.target * 3  # pulls the norm out
    settings = OptimizeSettings(shell_width=width, learning_rate=0.3, full_rate_iterations=30, patience=0)
    run = optimization(toy, settings, draw() * scale)
    run.run()
    low, high = chi_shell(draw().numel(), width)
    assert all(low - 1e-4 <= norm <= high + 1e-4 for norm in run.norms[1:])
    assert run.norms[0] == pytest.approx(float((draw() * scale).norm()))
    assert run.norms[-1] == pytest.approx(high, rel=1e-5)
    free = optimization(toy, replace(settings, shell_width=math.inf), draw() * scale)
    free.run()
    assert free.norms[-1] > high + 1


def test_the_guard_does_nothing_inside_the_shell():
    guarded, free = (optimization(settings=replace(AUTHORS, shell_width=w)) for w in (60.0, math.inf))
    assert torch.equal(guarded.run().noise, free.run().noise)
    noise = draw()
    assert onto_shell(noise, 60.0) is noise


def test_patience_ends_what_gains_nothing():
    toy = Toy()
    settings = OptimizeSettings(learning_rate=3.0, full_rate_iterations=100, patience=4, iterations=50)
    run = optimization(toy, settings, draw(9))
    found = run.run()
    assert found.score == 0.0
    assert len(run.scores) == 5
    assert toy.gradients == [True] * 5
    assert run.best_iteration == 0


def test_patience_counts_from_the_last_best():
    table = [5.0, 6.0, 4.0, 4.5, 4.0, 4.25, 9.0, 1.0]
    toy = Toy()
    values = iter(table)
    toy.score = lambda latents: latents[-1].mean() * 0 + next(values)
    run = optimization(toy, OptimizeSettings(patience=3))
    found = run.run()
    assert run.scores == table[:6]
    assert (found.score, run.best_iteration) == (4.0, 2)


def test_costs_and_progress():
    told, run = (
        [],
        optimization(settings=replace(AUTHORS, iterations=4), cost=GradientCost(forward=20, with_gradient=35)),
    )
    run.run(lambda done, total, score, picture: told.append((done, total, score, picture())))
    assert [done for done, *_ in told] == [35, 70, 105, 140, 160]
    assert {total for _, total, *_ in told} == {160}
    assert [score for _, _, score, _ in told] == [min(run.scores[: k + 1]) for k in range(5)]
    toy = Toy()
    for _, _, score, picture in told:
        assert float(toy.score([picture])) == score
        assert not picture.requires_grad
    series = run.series(before=1000)
    assert series.evaluations == (1035, 1070, 1105, 1140, 1160)
    assert series.scores == tuple(run.scores)
    assert series.best == tuple(score for _, _, score, _ in told)


def test_an_interrupted_run_has_its_best():
    class Interrupt(Exception):
        pass

    def progress(done, total, score, picture):
        if done == 6:
            raise Interrupt

    whole = optimization()
    whole.run()
    run = optimization()
    assert run.best is None
    with pytest.raises(Interrupt):
        run.run(progress)
    assert run.scores == whole.scores[:6]
    assert run.best.score == min(whole.scores[:6])
    toy = Toy()
    assert float(toy.score(toy.unroll(run.best.noise))) == run.best.score


def test_an_interrupt_out_of_the_model_leaves_the_best_too():
    class Interrupt(Exception):
        pass

    toy = Toy()
    calls = iter(range(100))
    unroll = toy.unroll

    def interrupted(noise):
        if next(calls) == 3:
            raise Interrupt
        return unroll(noise)

    toy.unroll = interrupted
    run = optimization(toy)
    with pytest.raises(Interrupt):
        run.run()
    assert run.best.score == min(run.scores)
    assert len(run.scores) == 3


def test_it_runs_inside_inference_mode_as_nodes_do():
    expected = optimization().run()
    with torch.inference_mode():
        found = optimization(start=draw()).run()
        assert torch.is_inference_mode_enabled()
    assert torch.equal(found.noise, expected.noise)
    assert found.score == expected.score
    with torch.no_grad():
        assert optimization().run().score == expected.score


def test_the_latent_is_that_of_a_plain_run():
    toy = Toy()
    toy.to_latent = lambda latent: latent / 0.18
    found = optimization(toy).run()
    torch.testing.assert_close(found.latent, toy.picture(found.noise) / 0.18)
    assert (found.label, found.seed, found.sampler_seed) == ("start", 5, 6)


def test_two_runs_give_the_same_bits():
    first, second = optimization().run(), optimization().run()
    assert torch.equal(first.noise, second.noise)
    assert torch.equal(first.latent, second.latent)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_names_start_and_iteration(at, value):
    toy = Toy()
    score, calls = toy.score, iter(range(100))
    toy.score = lambda latents: score(latents) * (value if next(calls) == at else 1.0)
    run = optimization(toy, label="seed 12")
    told = {0: "at the start; run the model", 2: "after iteration 2; use a smaller learning_rate than 0.1, or run"}[at]
    with pytest.raises(ValueError, match=f"the score of seed 12 is {value} {told}"):
        run.run()
    assert (run.best is None) == (at == 0)


def test_a_gradient_that_is_not_finite_is_refused():
    toy = Toy()
    toy.score = lambda latents: (latents[-1] * 0).abs().sqrt().sum()
    with pytest.raises(ValueError, match="the gradient of seed 3 is not finite at the start"):
        optimization(toy, label="seed 3").run()


def test_a_model_without_a_gradient_is_refused():
    toy = Toy()
    toy.unroll = lambda noise: [toy.picture(noise.detach())]
    with pytest.raises(ValueError, match="the score has no gradient to the noise; use a model"):
        optimization(toy).run()
    weight = torch.ones((), requires_grad=True)
    toy.score = lambda latents: latents[-1].mean() * weight
    with pytest.raises(ValueError, match="the score has no gradient to the noise"):
        optimization(toy).run()


def test_a_score_of_a_batch_is_refused():
    toy = Toy()
    toy.score = lambda latents: latents[-1].flatten()[:2]
    with pytest.raises(ValueError, match=r"score\(\) gave 2 numbers for one noise"):
        optimization(toy).run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(iterations=-1), "iterations -1 is negative; use 0 to keep the noise"),
        (dict(learning_rate=0.0), "learning_rate 0 is not above 0"),
        (dict(learning_rate=math.nan), "learning_rate nan is not above 0"),
        (dict(learning_rate=math.inf), "learning_rate inf is not above 0"),
        (dict(patience=-1), "patience -1 is negative"),
        (dict(shell_width=0.0), "shell_width 0 is not above 0"),
    ],
    ids=str,
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizeSettings(**changes)


def test_noises_that_are_refused():
    with pytest.raises(ValueError, match="noise of size 2x4x8x8 is not one sample"):
        optimization(start=draw().repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="the noise is not finite"):
        optimization(start=draw() * math.nan)
