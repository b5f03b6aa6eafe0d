"""The model of the scores, against the textbook formulas and on data of known parameters."""

import numpy as np
import pytest

from chorus.techniques.saliency_blend.tuning_model import FEW_STEPS_NOISE, ScoreModel, Scores, _covariance, _likelihood


def smooth(places):
    return np.sin(3 * places[:, 0]) + 0.5 * places[:, 1]


def drawn(count=80, noise=0.2, seeds=4, few=0.0, random=0):
    rng = np.random.default_rng(random)
    places, of_seed = rng.random((count, 3)), rng.normal(size=seeds) * 0.3
    numbers, early = rng.integers(seeds, size=count), rng.random(count) < few
    values = 2.0 + smooth(places) + of_seed[numbers] + noise * rng.normal(size=count) + 0.7 * early
    return Scores(places, values, numbers, early)


def test_estimates_are_those_of_the_textbook():
    """Mean and variance of a conditional Gaussian, by a plain inverse."""
    scores = drawn(30)
    model = ScoreModel(scores)
    v, scale = model._variances, model._scale
    at = np.random.default_rng(1).random((5, 3))

    def kernel(a, b):
        return v.signal * np.array([[np.exp(-0.5 * sum(((x - y) / v.lengths) ** 2)) for y in b] for x in a])

    same = np.array([[float(a == b) for b in scores.seeds] for a in scores.seeds])
    inverse = np.linalg.inv(kernel(scores.places, scores.places) + v.seed * same + (v.noise + 1e-6) * np.eye(30))
    between = kernel(at, scores.places)
    means = scores.values.mean() + between @ inverse @ (scores.values - scores.values.mean())
    variances = scale**2 * (v.signal - np.einsum("ij,jk,ik->i", between, inverse, between))
    found = model.estimate(at)
    assert found[0] == pytest.approx(means, abs=1e-8)
    assert found[1] ** 2 == pytest.approx(variances, abs=1e-8)


def test_likelihood_is_that_of_a_gaussian():
    from scipy.stats import multivariate_normal

    scores = drawn(20)
    model = ScoreModel(scores)
    covariance = _covariance(scores, model._variances)
    exact = multivariate_normal(np.zeros(20), covariance).logpdf(scores.values)
    constant = -0.5 * 20 * np.log(2 * np.pi)
    assert _likelihood(scores, scores.values, model._variances) == pytest.approx(exact - constant)


def test_many_noisy_scores_give_a_better_estimate_than_single_ones():
    scores = drawn(200, noise=0.5)
    means, deviations = ScoreModel(scores).estimate(scores.places)
    truth = 2.0 + smooth(scores.places)
    error = np.std(means - truth)
    assert error < 0.5 * np.std(scores.values - truth)
    assert error == pytest.approx(np.sqrt(np.mean(deviations**2)), rel=1.0)


def test_a_setting_without_effect_gets_the_longest_scale():
    assert ScoreModel(drawn(150))._variances.lengths[2] == 2.0


def test_scores_with_few_steps_help_in_spite_of_their_other_mean():
    both = drawn(120, few=0.8)
    truth = 2.0 + smooth(both.places)
    without = both.part(~both.few)
    errors = [np.std(ScoreModel(s).estimate(both.places)[0] - truth) for s in (both, without)]
    assert errors[0] < errors[1]
    noise = np.diag(_covariance(both, ScoreModel(both)._variances))
    signal = ScoreModel(both)._variances.signal
    assert noise[both.few][0] - noise[~both.few][0] == pytest.approx(FEW_STEPS_NOISE * signal)


def test_equal_scores_are_estimated_as_this_score():
    scores = Scores(np.random.default_rng(0).random((6, 2)), np.full(6, 0.4), np.arange(6), np.zeros(6, bool))
    means, deviations = ScoreModel(scores).estimate(scores.places)
    assert means == pytest.approx(0.4)
    assert not deviations.any()
