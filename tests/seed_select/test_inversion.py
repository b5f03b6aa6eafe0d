"""DDIM inversion compared with DDIM sampling and the formulas in the code of NAO's authors."""

import itertools
import math

import pytest
import torch

from chorus.techniques.seed_select.inversion import invert
from chorus.techniques.seed_select.losses import vp_scale

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (2, 3, 4, 4)
VE = torch.cat([torch.logspace(1.1, -1.5, 12, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
FLOW = torch.linspace(1, 0, 13, dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MIX = torch.linalg.qr(draw(48, 48))[0] * 0.4


def network(x, sigma):
    """A smooth, nonlinear estimate of x0, computed from the latent in VP scale."""
    s = sigma.view(-1, 1, 1, 1)
    y = vp_scale(x, s)
    h = torch.tanh(y.flatten(1) @ MIX).view_as(x)
    return (y + 0.5 * h * s / (1 + s)) / (1 + s**2).sqrt()


def ddim(x, sigmas):
    """DDIM sampling: splits x into x0 and noise at σ and recombines them at the next σ."""
    flow = float(sigmas[0]) == 1.0
    for now, then in itertools.pairwise(sigmas):
        x0 = network(x, now.expand(len(x)))
        noise = (x - (1 - now) * x0) / now if flow else (x - x0) / now
        x = (1 - then) * x0 + then * noise if flow else x0 + then * noise
    return x


@pytest.mark.parametrize("flow", [False, True])
def test_sampling_from_a_refined_inversion_returns_to_the_image(flow):
    x0, sigmas = draw(*SHAPE), FLOW if flow else VE
    calls = []

    def denoise(x, sigma):
        calls.append(float(sigma[0]))
        return network(x, sigma)

    errors = []
    for refinements in (0, 3, 60):
        calls.clear()
        noise = invert(denoise, x0, sigmas, flow=flow, refinements=refinements)
        assert len(calls) == 12 * (1 + refinements)
        assert min(calls) > 0
        errors.append(float((ddim(noise, sigmas) - x0).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-8


def test_inversion_equals_the_authors_formulas():
    """Recomputes the authors' next_step in VP scale: eps at the upper level, from the latent of the lower level."""
    x0, levels = draw(*SHAPE), VE.flip(0)
    alphas, y = 1 / (1 + levels**2), x0
    for i in range(len(levels) - 1):
        scaled = y / alphas[i + 1].sqrt()
        eps = (scaled - network(scaled, levels[i + 1].expand(2))) / levels[i + 1]
        start = (y - (1 - alphas[i]).sqrt() * eps) / alphas[i].sqrt()
        y = alphas[i + 1].sqrt() * start + (1 - alphas[i + 1]).sqrt() * eps
    torch.testing.assert_close(vp_scale(invert(network, x0, VE), VE[0]), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "sigmas", [[], [0.0], [3.0, 1.0], [3.0, 3.0, 0.0], [0.0, 1.0, 3.0], [3.0, math.nan, 0.0]], ids=str
)
def test_invalid_sigmas_rejected(sigmas):
    with pytest.raises(ValueError, match="do not decrease to 0 in every step"):
        invert(network, draw(*SHAPE), torch.tensor(sigmas, dtype=torch.float64))


def test_invalid_refinements_rejected():
    with pytest.raises(ValueError, match="refinements -1 is negative"):
        invert(network, draw(*SHAPE), VE, refinements=-1)
