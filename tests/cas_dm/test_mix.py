"""Tests of the mix x̂ = r x_φ + (1 − r) x̂_θ.

A step with x̂ equals the papers' reverse step. L2 and the metric train only x_φ, and the gate loss trains only r.
x̂_θ is the x0 of the frozen model θ, x_φ the x0 of the head φ, and r the gate of the head.
"""

import math

import pytest
import torch

from chorus.techniques.cas_dm.mix import (
    MAX_LEVEL,
    alpha_bar,
    amplitudes,
    losses,
    mix,
    noise_level,
    posterior,
    posterior_weight,
    predict,
    refine,
    total,
)
from chorus.techniques.cas_dm.network import CasDMHeadConfig, CasDMHeadNet

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = 2, 3, 5, 4


def noise64(*shape):
    return torch.randn(*(shape or SHAPE), dtype=torch.float64)


def ddpm():
    """(β, ᾱ) of DDPM's linear schedule, t = 1 .. 1000 at index t - 1."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return beta, (1 - beta).cumprod(0)


def gaussian_mean(x0, x_t, before, beta):
    """E[x_{t−1} | x_t, x0] by Bayes' rule: the product of q(x_{t−1} | x0) and q(x_t | x_{t−1}). ``before``: ᾱ_{t−1}."""
    p, q = 1 / (1 - before), (1 - beta) / beta  # precisions of the two Gaussians as functions of x_{t−1}
    return (p * before.sqrt() * x0 + q * x_t / (1 - beta).sqrt()) / (p + q)


def means(t, x0, eps, eps_theta, x_phi):
    """(posterior mean from x_φ, posterior mean from θ's noise, x_t, x̂_θ, (A_t, B_t)) at step ``t``.

    The mean from θ's noise ``eps_theta`` is computed by the formula of Dual-Output Diffusion.
    """
    beta, bars = ddpm()
    before, now, b = bars[t - 2], bars[t - 1], beta[t - 1]
    x_t = now.sqrt() * x0 + (1 - now).sqrt() * eps
    by_noise = x_t / (1 - b).sqrt() - b / ((1 - now).sqrt() * (1 - b).sqrt()) * eps_theta
    x_theta = (x_t - (1 - now).sqrt() * eps_theta) / now.sqrt()
    return gaussian_mean(x_phi, x_t, before, b), by_noise, x_t, x_theta, posterior(before, now)


@pytest.mark.parametrize("t", [2, 3, 10, 250, 600, 999, 1000])
def test_mixed_posterior_means_equal_posterior_mean_of_mixed_x0(t):
    r, (x0, eps, eps_theta, x_phi) = torch.rand(2, 1, 5, 4, dtype=torch.float64), (noise64() for _ in range(4))
    by_phi, by_noise, x_t, x_theta, (a, b) = means(t, x0, eps, eps_theta, x_phi)
    torch.testing.assert_close(a * x_phi + b * x_t, by_phi, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a * x_theta + b * x_t, by_noise, rtol=1e-9, atol=1e-9)
    mixed = r * by_phi + (1 - r) * by_noise
    torch.testing.assert_close(a * mix(x_theta, x_phi, r) + b * x_t, mixed, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(by_phi, by_noise, rtol=1e-3)


@pytest.mark.parametrize("t", [2, 250, 1000])
def test_gate_loss_is_squared_distance_of_true_and_mixed_posterior_mean(t):
    r, (x0, eps, eps_theta, x_phi) = torch.rand(2, 1, 5, 4, dtype=torch.float64), (noise64() for _ in range(4))
    beta, bars = ddpm()
    by_phi, by_noise, x_t, x_theta, _ = means(t, x0, eps, eps_theta, x_phi)
    true = gaussian_mean(x0, x_t, bars[t - 2], beta[t - 1])
    distance = (true - (r * by_phi + (1 - r) * by_noise)).square().flatten(1).mean(1)
    weight = posterior_weight(bars[t - 2], bars[t - 1])
    gate = losses(x0, x_theta, x_phi, r, gate_weight=weight)["gate"]
    torch.testing.assert_close(gate, distance, rtol=1e-8, atol=0)
    torch.testing.assert_close(losses(x0, x_theta, x_phi, r)["gate"], distance / weight, rtol=1e-8, atol=0)


def test_posterior_mean_of_the_last_step_is_x0():
    a, b = posterior(torch.ones((), dtype=torch.float64), ddpm()[1][0])
    assert (float(a), float(b)) == (1.0, 0.0)


@pytest.mark.parametrize("flow", [False, True])
def test_euler_step_with_mixed_x0_equals_mix_of_euler_steps(flow):
    x, x_theta, x_phi, r = noise64(), noise64(), noise64(), torch.rand(2, 1, 5, 4, dtype=torch.float64)
    now, next_sigma = 0.7, 0.4

    def step(x0):  # for eps and flow alike, d x / d sigma is (x - x0) / sigma
        return x + (x - x0) / now * (next_sigma - now)

    torch.testing.assert_close(
        step(mix(x_theta, x_phi, r)), r * step(x_phi) + (1 - r) * step(x_theta), rtol=1e-12, atol=1e-12
    )


def test_noise_level_is_equal_for_all_prediction_types():
    ratio = torch.tensor([0.03, 0.5, 1.0, 14.6], dtype=torch.float64)
    ve, flow = amplitudes(ratio, False), amplitudes(ratio / (1 + ratio), True)
    scaled = amplitudes(ratio / (2 + ratio), True, noise_scale=2.0)
    for kind in (ve, flow, scaled):
        torch.testing.assert_close(noise_level(*kind), ratio.log())
        torch.testing.assert_close(alpha_bar(*kind), 1 / (1 + ratio**2))


@pytest.mark.parametrize(
    ("sigma", "flow", "expected"), [(1.0, True, 1), (4518.8, False, 1), (0.0, False, -1), (0.0, True, -1)]
)
def test_noise_level_is_bounded(sigma, flow, expected):
    assert noise_level(*amplitudes(torch.tensor([sigma]), flow)).tolist() == [expected * MAX_LEVEL]


@pytest.mark.parametrize(("sigma", "flow"), [(3.0, False), (0.05, False), (0.25, True), (1.0, True)])
def test_head_input_x_has_unit_variance(sigma, flow):
    clean, noise, seen = torch.randn(1, 1, 200, 200), torch.randn(1, 1, 200, 200), []
    signal, amount = amplitudes(torch.tensor([sigma]), flow)

    def network(x_theta, level, x):
        seen.append((x_theta, x))
        return x_theta, torch.zeros(1, 1, 1, 1)

    predict(network, clean, signal * clean + amount * noise, torch.tensor([sigma]), flow=flow)
    assert seen[0][0] is clean
    assert abs(float(seen[0][1].var()) - 1) < 0.03


def shift(by, r=1.0):
    return lambda x_theta, level, x: (x_theta + by, torch.full((1, 1, 1, 1), r))


def test_strength_scales_the_correction():
    x0, x, sigma = torch.randn(SHAPE), torch.randn(SHAPE), torch.full((2,), 2.0)
    assert refine(shift(1.0), x0, x, sigma, strength=0.0) is x0
    for strength, r in [(1.0, 1.0), (0.5, 1.0), (1.0, 0.25), (2.0, 0.5)]:
        actual = refine(shift(1.0, r), x0, x, sigma, strength=strength)
        torch.testing.assert_close(actual, x0 + strength * r)
    assert torch.equal(refine(shift(0.0, 0.3), x0, x, sigma, strength=0.7), x0)


def test_half_precision_is_refined_in_float32():
    seen = []

    def network(x_theta, level, x):
        seen.extend([x_theta.dtype, level.dtype, x.dtype])
        return x_theta, torch.ones(1, 1, 1, 1)

    x0 = torch.randn(SHAPE).half()
    out = refine(network, x0, torch.randn(SHAPE).half(), torch.ones(2).half())
    assert seen == [torch.float32] * 3
    assert out.dtype == torch.float16 and torch.equal(out, x0)


def test_each_sample_gets_the_noise_level_of_its_sigma():
    seen = []

    def network(x_theta, level, x):
        seen.append(level)
        return x_theta, torch.ones(1, 1, 1, 1)

    refine(network, torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([0.5, 0.8]), flow=True)
    torch.testing.assert_close(seen[0], torch.tensor([0.0, math.log(4)]))


def random_head(gate="pixel", **config):
    network = CasDMHeadNet(
        CasDMHeadConfig(channels=3, widths=(8, 16), gate=gate, condition_on_x_t=True, **config)
    ).double()
    return network.requires_grad_(True)


def theta():
    return torch.nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64)


def metric(a, b):
    return (a - b).abs().flatten(1).mean(1)


@pytest.mark.parametrize("gate", ["pixel", "channel", "sample"])
@pytest.mark.parametrize("flow", [False, True])
def test_l2_and_metric_train_only_x_phi_and_gate_loss_trains_only_r(gate, flow):
    frozen, network = theta(), random_head(gate)
    x0, x, sigma = noise64(), noise64(), torch.tensor([0.3, 0.9], dtype=torch.float64)

    def gradients(name):
        x_theta = frozen(x)
        x_phi, r = predict(network, x_theta.detach(), x, sigma, flow=flow)  # as in training: no gradient for θ
        parts = losses(x0, x_theta, x_phi, r, metric=metric)
        inputs = [network.last.weight, network.first.weight, *frozen.parameters()]
        return torch.autograd.grad(parts[name].sum(), inputs, allow_unused=True)

    for name in ("l2", "metric"):
        last, first, *others = gradients(name)
        assert last[:3].abs().min() > 0 and first.abs().sum() > 0
        assert torch.count_nonzero(last[3:]) == 0  # the gradient of r's weights is exactly 0
        assert others == [None] * 2
    last, first, *others = gradients("gate")
    assert torch.count_nonzero(last[:3]) == 0  # the gradient of x_phi's weights is exactly 0
    assert last[3:].abs().min() > 0 and first.abs().sum() > 0
    assert others == [None] * 2


def test_image_losses_have_no_gradient_for_r():
    x0, x_theta = noise64(), noise64().requires_grad_(True)
    x_phi, r = noise64().requires_grad_(True), torch.rand(2, 1, 5, 4, dtype=torch.float64, requires_grad=True)
    parts = losses(x0, x_theta, x_phi, r, metric=metric)
    for name in ("l2", "metric"):
        grads = torch.autograd.grad(parts[name].sum(), [r, x_theta], allow_unused=True)
        assert grads == (None, None)
    grads = torch.autograd.grad(parts["gate"].sum(), [x_phi, x_theta, r], allow_unused=True)
    assert grads[:2] == (None, None)
    # d/dr of the mean of (x0 - x_theta - r (x_phi - x_theta))²
    d = (x_phi - x_theta).detach()
    expected_parts = (-2 * d * (x0 - x_theta.detach() - r.detach() * d)).sum(1, keepdim=True) / x0[0].numel()
    torch.testing.assert_close(grads[2], expected_parts)


def test_loss_parts_and_total():
    x0, x_theta, x_phi, r = noise64(), noise64(), noise64(), torch.tensor(0.25, dtype=torch.float64)
    parts = losses(x0, x_theta, x_phi, r, metric=metric, gate_weight=torch.tensor([1.0, 3.0]))
    assert list(parts) == ["l2", "metric", "gate"]
    expected_parts = {
        "l2": ((x0 - x_phi) ** 2).mean((1, 2, 3)),
        "metric": (x0 - x_phi).abs().mean((1, 2, 3)),
        "gate": ((x0 - 0.25 * x_phi - 0.75 * x_theta) ** 2).mean((1, 2, 3)) * torch.tensor([1.0, 3.0]),
    }
    for name, part in parts.items():
        torch.testing.assert_close(part, expected_parts[name])
    expected = expected_parts["l2"].mean() + 0.5 * expected_parts["metric"].mean() + 2 * expected_parts["gate"].mean()
    torch.testing.assert_close(total(parts, metric_weight=0.5, gate_weight=2.0), expected)
    assert list(losses(x0, x_theta, x_phi, r)) == ["l2", "gate"]
    torch.testing.assert_close(total(losses(x0, x_theta, x0, r)) * 16, ((x0 - x_theta) ** 2).mean() * 9)


def test_gradient_passes_through_a_head_to_the_noise():
    network = random_head()
    x, sigma = noise64().requires_grad_(True), torch.tensor([0.3, 0.9], dtype=torch.float64)

    def f(x):
        x_phi, r = predict(network, 0.5 * x, x, sigma, flow=False)
        return mix(0.5 * x, x_phi, r).square().sum()

    (grads,) = torch.autograd.grad(f(x), x)
    direction = noise64()
    h = 1e-6
    with torch.no_grad():
        slope = (f(x + h * direction) - f(x - h * direction)) / (2 * h)
    torch.testing.assert_close((grads * direction).sum(), slope, rtol=1e-6, atol=0)
