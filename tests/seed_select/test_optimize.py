"""Optimisation of a noise on models with a known minimum, and compared with the authors' loop."""

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
    """A model whose image is a nonlinear function of the noise; the score is the distance to the image of another noise."""

    def __init__(self, target=9):
        self.target, self.gradients = self.image(draw(target)), []

    def image(self, noise):
        return torch.sinh(noise / 2) * 2

    def unroll(self, noise):
        self.gradients.append(torch.is_grad_enabled())
        return [self.image(noise) * 0.9, self.image(noise)]

    def to_latent(self, latent):
        return latent

    def score(self, latents):
        return ((latents[-1] - self.target) ** 2).flatten(1).mean(1)


def optimization(toy=None, settings=AUTHORS, start=None, label="start", cost=None):
    toy = toy or Toy()
    start = draw() if start is None else start
    return SeedOptimization(Candidate(label, lambda: start, 5, 6), toy, settings, cost)


def authors_loop(toy, start, iterations=30, rate=0.1):
    """Scores in the authors' optimize_seed, before each step and after the last step, and the final noise."""
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
def test_defaults_equal_the_authors_loop(rate):
    run = optimization(settings=replace(AUTHORS, learning_rate=rate))
    found = run.run()
    scores, noise = authors_loop(Toy(), draw(), rate=rate)
    assert run.scores == scores
    assert found.score == min(scores) < 0.7 * scores[0]
    assert found.score == scores[-1]
    assert torch.equal(found.noise, noise)
    assert (OptimizeSettings().iterations, OptimizeSettings().learning_rate) == (30, 0.1)


def test_finds_the_minimum():
    settings = replace(AUTHORS, iterations=600, full_rate_iterations=400, weight_decay=0.0)
    run = optimization(settings=settings)
    found = run.run()
    assert found.score < 1e-6
    torch.testing.assert_close(found.noise, draw(9), rtol=0, atol=0.01)


def test_best_iterate_returned_not_the_last():
    run = optimization(settings=replace(AUTHORS, learning_rate=3.0, full_rate_iterations=100), start=draw(9) * 1.05)
    found = run.run()
    assert run.scores[-1] > found.score == min(run.scores)
    assert run.scores[run.best_iteration] == found.score
    toy = Toy()
    assert float(toy.score(toy.unroll(found.noise))) == found.score
    assert torch.equal(found.latent, toy.image(found.noise))
    assert run.norms[run.best_iteration] == pytest.approx(float(found.noise.norm()), rel=1e-6)


def test_returns_initial_noise_if_no_iterate_is_better():
    start = draw(9)
    found = optimization(settings=AUTHORS, start=start).run()
    assert found.noise is start
    assert found.score == 0.0


def test_0_iterations_return_initial_noise_without_a_gradient():
    for start in (draw(), draw() * 7):
        toy, before = Toy(), start.clone()
        run = optimization(toy, OptimizeSettings(iterations=0), start)
        found = run.run()
        assert found.noise is start
        assert torch.equal(start, before)
        assert toy.gradients == [False]
        assert run.scores == [found.score]


def test_initial_noise_is_not_modified():
    start = draw()
    optimization(start=start).run()
    assert torch.equal(start, draw())


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.4])
@pytest.mark.parametrize("width", [0.5, 3.0])
def test_norm_stays_in_the_shell(scale, width):
    toy = Toy()
    toy.target = toy.target * 3  # the gradient increases the norm
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


def test_shell_does_not_change_norms_inside_it():
    guarded, free = (optimization(settings=replace(AUTHORS, shell_width=w)) for w in (60.0, math.inf))
    assert torch.equal(guarded.run().noise, free.run().noise)
    noise = draw()
    assert onto_shell(noise, 60.0) is noise


def test_patience_stops_without_improvement():
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
    calls, run = (
        [],
        optimization(settings=replace(AUTHORS, iterations=4), cost=GradientCost(forward=20, with_gradient=35)),
    )
    run.run(lambda done, total, score, latent: calls.append((done, total, score, latent())))
    assert [done for done, *_ in calls] == [35, 70, 105, 140, 160]
    assert {total for _, total, *_ in calls} == {160}
    assert [score for _, _, score, _ in calls] == [min(run.scores[: k + 1]) for k in range(5)]
    toy = Toy()
    for _, _, score, latent in calls:
        assert float(toy.score([latent])) == score
        assert not latent.requires_grad
    series = run.series(before=1000)
    assert series.evaluations == (1035, 1070, 1105, 1140, 1160)
    assert series.scores == tuple(run.scores)
    assert series.best == tuple(score for _, _, score, _ in calls)


def test_interrupted_run_has_a_best_result():
    class Interrupt(Exception):
        pass

    def progress(done, total, score, latent):
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


def test_interrupt_inside_the_model_keeps_the_best():
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


def test_runs_inside_inference_mode():
    expected = optimization().run()
    with torch.inference_mode():
        found = optimization(start=draw()).run()
        assert torch.is_inference_mode_enabled()
    assert torch.equal(found.noise, expected.noise)
    assert found.score == expected.score
    with torch.no_grad():
        assert optimization().run().score == expected.score


def test_latent_of_the_result_is_in_the_scale_of_to_latent():
    toy = Toy()
    toy.to_latent = lambda latent: latent / 0.18
    found = optimization(toy).run()
    torch.testing.assert_close(found.latent, toy.image(found.noise) / 0.18)
    assert (found.label, found.seed, found.sampler_seed) == ("start", 5, 6)


def test_runs_are_deterministic():
    first, second = optimization().run(), optimization().run()
    assert torch.equal(first.noise, second.noise)
    assert torch.equal(first.latent, second.latent)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_score_error_names_noise_and_iteration(at, value):
    toy = Toy()
    score, calls = toy.score, iter(range(100))
    toy.score = lambda latents: score(latents) * (value if next(calls) == at else 1.0)
    run = optimization(toy, label="seed 12")
    text = {0: "at the start; run the model", 2: "after iteration 2; use a smaller learning_rate than 0.1, or run"}[at]
    with pytest.raises(ValueError, match=f"the score of seed 12 is {value} {text}"):
        run.run()
    assert (run.best is None) == (at == 0)


def test_non_finite_gradient_rejected():
    toy = Toy()
    toy.score = lambda latents: (latents[-1] * 0).abs().sqrt().sum()
    with pytest.raises(ValueError, match=r"the gradient of seed 3 is not finite \(NaN or infinite\) at the start"):
        optimization(toy, label="seed 3").run()


def test_model_without_a_gradient_rejected():
    toy = Toy()
    toy.unroll = lambda noise: [toy.image(noise.detach())]
    with pytest.raises(ValueError, match="the score has no gradient with respect to the noise; use a"):
        optimization(toy).run()
    weight = torch.ones((), requires_grad=True)
    toy.score = lambda latents: latents[-1].mean() * weight
    with pytest.raises(ValueError, match="the score has no gradient with respect to the noise"):
        optimization(toy).run()


def test_score_of_a_batch_rejected():
    toy = Toy()
    toy.score = lambda latents: latents[-1].flatten()[:2]
    with pytest.raises(ValueError, match=r"expected one number from score\(\) for one noise, got 2"):
        optimization(toy).run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(iterations=-1), "iterations -1 is negative; use 0 to leave the noise unchanged"),
        (dict(learning_rate=0.0), "learning_rate 0 is not a finite number above 0"),
        (dict(learning_rate=math.nan), "learning_rate nan is not a finite number above 0"),
        (dict(learning_rate=math.inf), "learning_rate inf is not a finite number above 0"),
        (dict(patience=-1), "patience -1 is negative"),
        (dict(shell_width=0.0), "shell_width 0 is not above 0"),
    ],
    ids=str,
)
def test_invalid_settings_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizeSettings(**changes)


def test_invalid_noises_rejected():
    with pytest.raises(ValueError, match="noise of size 2x4x8x8 is not one sample"):
        optimization(start=draw().repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="the noise is not finite"):
        optimization(start=draw() * math.nan)


def test_float16_noise_is_optimised_as_the_same_noise_in_float32():
    """In float16 the epsilon of AdamW is 0, and numbers without a gradient would become 0 / 0."""

    class Half(Toy):
        def image(self, noise):
            return super().image(noise) * (torch.arange(8) < 4)  # no gradient in the right half

    narrow = draw().half()
    found, expected = (optimization(Half(), start=start).run() for start in (narrow, narrow.float()))
    assert found.noise.dtype == torch.float32
    assert torch.equal(found.noise, expected.noise)
    assert found.score < Half().score([Half().image(draw())])
    unchanged = optimization(start=narrow, settings=replace(AUTHORS, iterations=0)).run()
    assert torch.equal(unchanged.noise, narrow)
