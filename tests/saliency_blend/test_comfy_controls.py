"""The controls of an expert's area have similar effects on models of different architecture and size."""

import itertools

import pytest
import torch

from chorus.dev.benchmarks import blend_controls
from chorus.dev.benchmarks.blend_controls import deviation, share_of, shares_by_ring, weights
from chorus.tests.support.tiny_models import blend, conditioning, unet

PAIRS = [
    pytest.param("demo", marks=pytest.mark.slow),
    "DiT",
    "small UNet",
    pytest.param("SD 1.5-sized", marks=pytest.mark.exhaustive),
]


@pytest.fixture(scope="module", params=PAIRS)
def steps(request):
    """The predictions of every step of a run."""
    if request.param == "small UNet":
        model, _ = blend(unet(0), unet(1))
        noise = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
        return blend_controls.capture(model, conditioning(1), conditioning(2), noise, 4)
    return blend_controls.captured(request.param, 16, 3)


def share(steps, **setting):
    return share_of(weights(steps, **setting))["share"]


@pytest.mark.slow
def test_half_a_unit_of_bias_changes_the_share_by_10_to_35_percent(steps):
    shares = [share(steps, bias=bias) for bias in (-0.5, 0.0, 0.5)]
    assert all(0.1 <= after - before <= 0.35 for before, after in itertools.pairwise(shares)), shares


def test_expert_gets_nearly_nothing_at_bias_minus_3_and_nearly_everything_at_bias_3(steps):
    assert share(steps, bias=-3.0) < 0.02
    assert share(steps, bias=3.0) > 0.98


def test_region_mask_of_0_9_keeps_most_of_the_share(steps):
    region = torch.full((1, *steps[0].positions), 0.9)
    assert share(steps, region=region) >= 0.7 * share(steps)


def test_share_falls_across_a_feathered_border(steps):
    rings = shares_by_ring(steps)
    assert all(outer < inner for inner, outer in itertools.pairwise(rings)), rings
    assert rings[0] > 0.3 and rings[2] > 0.02


def test_softness_widens_the_transition_of_a_hard_mask(steps):
    hard = weights(steps)
    assert float((weights(steps, softness=0.01) - hard).abs().mean()) < 0.02
    assert deviation(weights(steps, softness=1.0)) >= 0.15
    assert deviation(weights(steps, softness=0.3)) > 1.3 * deviation(weights(steps, softness=1.0))


@pytest.mark.parametrize("part", [0.1, 0.3, 0.5])
def test_expert_share_is_exact_to_one_position_at_every_step(steps, part):
    positions = steps[0].positions[0] * steps[0].positions[1]
    measured = share_of(weights(steps, share=part))
    assert abs(measured["lowest"] - part) <= 1 / positions and abs(measured["highest"] - part) <= 1 / positions


def test_momentum_reduces_flips_of_the_mask(steps):
    flips = [blend_controls.flips(weights(steps, momentum=m)) for m in (0.0, 0.5, 0.9)]
    assert flips[0] > flips[1] > flips[2]
