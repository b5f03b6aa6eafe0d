"""The torch implementations of the kernel compared with the float64 definition in tests/support/blend_definition.py."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from chorus.kernels.saliency_blend import fused_torch, reference, saliency_blend
from chorus.tests.support.blend_definition import definition

INF = float("inf")


def by_reference(cond, *args, **kwargs):
    """The reference implementation. Its weights are floats even for hard masks."""
    return reference.saliency_blend(cond, *args, **kwargs)[:3]


def by_fused_torch(cond, *args, **kwargs):
    out_cond, out_uncond, weights, *_ = fused_torch.saliency_blend(cond, *args, **kwargs)
    if weights.dtype == torch.uint8:
        weights = torch.stack([weights == i for i in range(len(cond))]).float()
    return out_cond, out_uncond, weights


@pytest.fixture(params=[by_reference, by_fused_torch], ids=["reference", "fused torch"])
def kernel(request):
    return request.param


def random_predictions(models, shape, dtype=torch.float32, seed=0):
    """(cond, uncond) of every model and σ [B]; cond - uncond grows with the index of the model."""
    generator = torch.Generator().manual_seed(seed)
    uncond = [torch.randn(shape, generator=generator) for _ in range(models)]
    cond = [u + (1 + 0.2 * i) * torch.randn(shape, generator=generator) for i, u in enumerate(uncond)]
    sigma = torch.linspace(0.5, 3.0, shape[0])
    return [c.to(dtype) for c in cond], [u.to(dtype) for u in uncond], sigma


def blend(kernel, cond, uncond, sigma=None, strength=None, bias=None, region=None, gain=None, **options):
    models = len(cond)
    options = {"blur": 4, "shared": False, "softness": None, **options}
    sigma = torch.ones(len(cond[0])) if sigma is None else sigma
    zeros, ones, none = [0.0] * models, [1.0] * models, [None] * models
    return kernel(cond, uncond, sigma, strength or ones, bias or zeros, region or none, gain or ones, **options)


def check(kernel, cond, uncond, sigma, strength=None, gain=None, bias=None, region=None, shared=False, **options):
    """``options``: those that have the same name in the kernel and in the definition."""
    zeros, ones = [0.0] * len(cond), [1.0] * len(cond)
    strength, gain, bias, region = strength or ones, gain or ones, bias or zeros, region or [None] * len(cond)
    given = (cond, uncond, sigma, strength, bias, region, gain)
    out_cond, out_uncond, weights = blend(kernel, *given, shared=shared, **options)
    assert out_cond.dtype == out_uncond.dtype == cond[0].dtype
    call = SimpleNamespace(x=torch.zeros_like(cond[0]), sigma=sigma)
    expected = definition(
        call,
        list(zip(cond, uncond, strict=True)),
        strengths=strength,
        guidance=[1.0] * len(cond),
        saliency="shared" if shared else "own",
        extra=np.stack(
            [
                b + np.broadcast_to(0.0 if r is None else r.double().numpy(), weights.shape[1:])
                for b, r in zip(bias, region)
            ]
        ),
        **options,
    )
    error = np.abs(weights.double().numpy() - expected.weights)[:, expected.certain]
    assert error.max() <= expected.weight_bound
    assert expected.certain.mean() > 0.99

    w = torch.from_numpy(expected.weights).unsqueeze(2)
    c, u = (torch.stack(t).double() for t in (cond, uncond))
    factors = torch.tensor(gain, dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
    certain = torch.from_numpy(expected.certain)
    rounding = torch.finfo(cond[0].dtype).eps
    largest = max(gain) * (c.abs() + u.abs()).amax(0)
    for got, exact in ((out_cond, ((u + factors * (c - u)) * w).sum(0)), (out_uncond, (u * w).sum(0))):
        bound = 4 * rounding * largest + 3 * expected.weight_bound * largest
        assert ((got.double() - exact).abs() <= bound).movedim(1, 0)[:, certain].all()


SHAPES = [(1, 4, 5, 7), (2, 16, 9, 4), (3, 1, 13, 6), (2, 4, 32, 48)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("models", [2, 3, 5])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("softness", [None, 1.0, 0.05])
def test_matches_the_definition(kernel, shape, models, shared, softness):
    cond, uncond, sigma = random_predictions(models, shape)
    strength = [0.5 + 0.4 * i for i in range(models)]
    gain = [1.0, 0.5, 2.0, 1.0, 1.5][:models]
    generator = torch.Generator().manual_seed(1)
    maps = [0.1 * torch.rand(shape[0], *shape[2:], generator=generator) for _ in range(2, models)]
    # the first expert has one region for all samples, the others one per sample
    region = [None, 0.02 * torch.rand(1, *shape[2:], generator=generator), *maps]
    bias = [-0.05 * i for i in range(models)]
    check(kernel, cond, uncond, sigma, strength, gain, bias, region, shared=shared, softness=softness)


@pytest.mark.parametrize("blur", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("size", [(11, 14), (1, 40), (40, 1)], ids=["image", "row", "column"])
def test_blur_matches_the_definition(kernel, size, blur):
    cond, uncond, sigma = random_predictions(2, (2, 4, *size))
    check(kernel, cond, uncond, sigma, blur=blur)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softness", [None, 1.0])
def test_half_precision_is_computed_in_float32(kernel, dtype, softness):
    """If the differences were rounded to half precision, the mask would change."""
    cond, uncond, sigma = random_predictions(3, (2, 4, 24, 20), dtype)
    check(kernel, cond, uncond, sigma, [2.0, 3.0, 2.5], softness=softness)


def test_reference_computes_in_float64_for_float64_predictions():
    """``bench gpu`` compares the kernels with it."""
    cond, uncond, sigma = random_predictions(3, (2, 4, 9, 8), torch.float64)
    region = [None, None, 0.1 * torch.rand(2, 9, 8, dtype=torch.float64)]
    out = blend(reference.saliency_blend, cond, uncond, sigma, region=region, softness=0.5, gain=[1.0, 0.3, 2.0])
    assert {t.dtype for t in out} == {torch.float64}
    expected = definition(
        SimpleNamespace(x=torch.zeros_like(cond[0]), sigma=sigma),
        list(zip(cond, uncond, strict=True)),
        strengths=[1.0] * 3,
        guidance=[1.0] * 3,
        extra=np.stack([np.zeros((2, 9, 8)), np.zeros((2, 9, 8)), region[2].numpy()]),
        softness=0.5,
    )
    torch.testing.assert_close(out[2], torch.from_numpy(expected.weights), rtol=0.0, atol=1e-12)
    torch.testing.assert_close(out[5], torch.from_numpy(expected.spread), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_hard_mask_keeps_every_bit_of_the_predictions(dtype):
    cond, uncond, sigma = random_predictions(3, (2, 4, 12, 10), dtype)
    out = saliency_blend(cond, uncond, sigma, [1.0] * 3, [0.0] * 3, [None] * 3, [1.0] * 3)
    owner = out.weights.long()
    assert owner.unique().tolist() == [0, 1, 2]
    for got, choices in ((out.cond, cond), (out.uncond, uncond)):
        picked = torch.stack(choices).gather(0, owner[None, :, None].expand(1, -1, 4, -1, -1))[0]
        assert torch.equal(got, picked)


def test_mask_depends_on_strength_times_saliency(kernel):
    """Twice the saliency at half the strength has the same mask."""
    cond, uncond, _ = random_predictions(2, (1, 4, 12, 10))
    doubled = uncond[1] + 2 * (cond[1] - uncond[1])
    weights = [blend(kernel, [cond[0], c], uncond, strength=[1.0, k])[2] for c, k in ((cond[1], 1.0), (doubled, 0.5))]
    assert torch.equal(*weights)


def test_ties_go_to_the_base_then_to_chain_order(kernel):
    cond, uncond, _ = random_predictions(1, (2, 4, 9, 8))
    weights = blend(kernel, cond * 3, uncond * 3)[2]
    assert weights[0].all()
    weights = blend(kernel, cond * 3, uncond * 3, bias=[0.0, 1.0, 1.0])[2]
    assert weights[0].all(), "the spread of equal models is 0, so that a bias adds 0"
    two = [random_predictions(1, (2, 4, 9, 8), seed=seed) for seed in (0, 1)]
    cond, uncond = ([a[side][0], b[side][0], b[side][0]] for side in (0, 1) for a, b in [two])
    weights = blend(kernel, cond, uncond, bias=[0.0, 100.0, 100.0])[2]
    assert weights[1].all()


@pytest.mark.parametrize("softness", [None, 1.0])
def test_infinite_region_forces_or_bars_an_expert(kernel, softness):
    cond, uncond, _ = random_predictions(3, (1, 4, 6, 6))
    forced = torch.full((1, 6, 6), -INF)
    forced[:, :3] = INF
    weights = blend(kernel, cond, uncond, region=[None, forced, torch.full((), -INF)], softness=softness)[2]
    assert (weights[1, :, :3] == 1).all()
    assert (weights[0, :, 3:] == 1).all()
    assert not weights[2].any()


def test_two_forced_experts_share_a_soft_mask_and_the_first_owns_a_hard_mask(kernel):
    cond, uncond, _ = random_predictions(3, (1, 4, 6, 6))
    both = [None, torch.full((), INF), torch.full((), INF)]
    assert blend(kernel, cond, uncond, region=both)[2][1].all()
    soft = blend(kernel, cond, uncond, region=both, softness=1.0)[2]
    assert torch.equal(soft[:, 0, 0, 0], torch.tensor([0.0, 0.5, 0.5]))


@pytest.mark.parametrize("softness", [None, 1.0])
def test_samples_of_a_batch_are_independent(kernel, softness):
    cond, uncond, sigma = random_predictions(3, (3, 4, 9, 8))
    together = blend(kernel, cond, uncond, sigma, softness=softness)
    for i in range(3):
        alone = blend(
            kernel, [c[i : i + 1] for c in cond], [u[i : i + 1] for u in uncond], sigma[i : i + 1], softness=softness
        )
        for whole, part, axis in zip(together, alone, (0, 0, 1), strict=True):
            torch.testing.assert_close(whole.narrow(axis, i, 1), part)


@pytest.mark.parametrize("softness", [None, 1.0])
def test_strided_inputs_are_accepted_and_unchanged(kernel, softness):
    cond, uncond, sigma = random_predictions(2, (2, 4, 9, 8))
    strided = [[t.transpose(2, 3).contiguous().transpose(2, 3) for t in ts] for ts in (cond, uncond)]
    before = [[t.clone() for t in ts] for ts in strided]
    got = blend(kernel, *strided, sigma, softness=softness, gain=[1.0, 2.0])
    expected = blend(kernel, cond, uncond, sigma, softness=softness, gain=[1.0, 2.0])
    for g, w in zip(got, expected, strict=True):
        torch.testing.assert_close(g, w)
    assert all(
        torch.equal(a, b) for now, old in zip(strided, before, strict=True) for a, b in zip(now, old, strict=True)
    )


@pytest.mark.parametrize("softness", [None, 1.0])
def test_video_frames_are_blended_as_samples(kernel, softness):
    cond, uncond, sigma = random_predictions(2, (2, 4, 3, 9, 8))
    region = [None, 0.1 * torch.rand(2, 3, 9, 8, generator=torch.Generator().manual_seed(1))]
    video = blend(kernel, cond, uncond, sigma, region=region, softness=softness)
    assert video[0].shape == video[1].shape == (2, 4, 3, 9, 8)
    assert video[2].shape == (2, 2, 3, 9, 8)
    for t in range(3):
        frames = [[p[:, :, t] for p in side] for side in (cond, uncond)]
        alone = blend(kernel, *frames, sigma, region=[None, region[1][:, t]], softness=softness)
        for whole, part in zip(video, alone, strict=True):
            torch.testing.assert_close(whole[:, :, t], part)


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (3, 3)], ids=str)
def test_latent_smaller_than_the_blur_is_blended(kernel, size):
    cond, uncond, sigma = random_predictions(2, (1, 4, *size))
    out_cond, _, weights = blend(kernel, cond, uncond, sigma, blur=12)
    assert torch.isfinite(out_cond).all()
    assert torch.equal(weights.sum(0), torch.ones(1, *size))


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
@pytest.mark.parametrize("side", ["cond", "uncond"])
@pytest.mark.parametrize("model", [0, 1])
@pytest.mark.parametrize("softness", [None, 1.0])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_non_finite_prediction_makes_the_partition_of_its_sample_non_finite(shared, softness, model, side, value):
    """``partition`` is ln of the mean exp(k Λ) of each model and sample."""
    cond, uncond, sigma = random_predictions(2, (2, 4, 6, 5))
    {"cond": cond, "uncond": uncond}[side][model][1, 2, 3, 4] = value
    out = saliency_blend(
        cond, uncond, sigma, [1.0] * 2, [0.0] * 2, [None] * 2, [1.0] * 2, shared=shared, softness=softness
    )
    finite = torch.isfinite(out.partition)
    assert not finite[model, 1]
    assert finite[:, 0].all()
    # shared saliency compares every model with the base's prediction for the negative prompt
    affects_others = shared and model == 0 and side == "uncond"
    assert finite[1 - model, 1] == (not affects_others)


def test_partition_of_finite_predictions_is_finite():
    cond, uncond, sigma = random_predictions(3, (2, 4, 6, 5))
    out = saliency_blend(cond, uncond, sigma, [1e3, 1e-3, 1.0], [0.0] * 3, [None] * 3, [1.0] * 3, shared=True)
    assert torch.isfinite(out.partition).all()


def lead_of(cond, uncond, sigma, strength):
    """Lead of every expert in units of its spread, by the definition: float64 [N - 1, B, H, W].

    The lead is the expert's score minus the base's, and the spread is its standard deviation over the positions.
    """
    call = SimpleNamespace(x=torch.zeros_like(cond[0]), sigma=sigma)
    expected = definition(call, list(zip(cond, uncond, strict=True)), strengths=strength, guidance=[1.0] * len(cond))
    return (expected.scores[1:] - expected.scores[0]) / expected.spread[1:, :, None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_lead_is_in_units_of_its_spread(dtype):
    cond, uncond, sigma = random_predictions(3, (2, 4, 24, 20), dtype)
    strength = [2.0, 3.0, 2.5]
    out = saliency_blend(cond, uncond, sigma, strength, [0.0] * 3, [None] * 3, [1.0] * 3)
    lead = out.lead()
    torch.testing.assert_close(
        lead.double(), torch.from_numpy(lead_of(cond, uncond, sigma, strength)), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(lead.flatten(2).std(2, correction=0), torch.ones(2, 2))


def test_lead_of_an_expert_equal_to_the_base_is_zero():
    cond, uncond, sigma = random_predictions(1, (2, 4, 9, 8))
    out = saliency_blend(cond * 2, uncond * 2, sigma, [1.0] * 2, [0.0, 3.0], [None] * 2, [1.0] * 2, softness=1.0)
    assert not out.spread.any() and not out.lead().any()
    assert (out.weights == 0.5).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_bias_has_the_same_effect_at_any_scale_of_saliency(scale):
    """If leads are normally distributed, a bias of 0.5 (in standard deviations) changes 19 % of the mask."""
    cond, uncond, _ = random_predictions(2, (8, 4, 40, 40))
    sigma = torch.full((8,), 1.0 / scale)
    shares = [
        (saliency_blend(cond, uncond, sigma, [1.0] * 2, [0.0, bias], [None] * 2, [1.0] * 2).weights == 1).float().mean()
        for bias in (-3.0, -0.5, 0.0, 0.5, 3.0)
    ]
    assert all(0.1 < b - a < 0.35 for a, b in itertools.pairwise(shares[1:4]))
    assert shares[0] < 0.02 and shares[4] > 0.98


def largest_positions(lead, count, allowed):
    """Mask of the ``count`` allowed positions with the largest ``lead`` [H, W]. The first of equal leads is taken."""
    order = sorted(np.flatnonzero(allowed.ravel()), key=lambda n: (-lead.ravel()[n], n))
    chosen = np.zeros(lead.size, bool)
    chosen[order[:count]] = True
    return chosen.reshape(lead.shape)


@pytest.mark.parametrize("count", [0, 1, 31, 96, 97, 120])
def test_quota_takes_the_positions_of_largest_lead(kernel, count):
    cond, uncond, sigma = random_predictions(2, (2, 4, 12, 8))
    weights = blend(kernel, cond, uncond, sigma, quota=[None, count], bias=[0.0, -50.0])[2]
    lead = lead_of(cond, uncond, sigma, [1.0, 1.0])[0]
    for sample in range(2):
        assert np.array_equal(
            weights[1, sample].bool().numpy(), largest_positions(lead[sample], count, np.ones((12, 8), bool))
        )


def test_quotas_respect_regions_and_chain_order(kernel):
    cond, uncond, sigma = random_predictions(4, (2, 4, 12, 8))
    left = torch.full((1, 12, 8), -INF)
    left[..., :3] = 0.0
    quota = [None, torch.tensor([10, 40]), 20, None]
    weights = blend(kernel, cond, uncond, sigma, quota=quota, region=[None, left, None, None])[2].numpy() > 0.5
    leads, free = lead_of(cond, uncond, sigma, [1.0] * 4), np.ones((2, 12, 8), bool)
    allowed = np.isfinite(left.numpy()[0])
    for sample, first in enumerate((10, 36)):  # the region limits the quota of 40 to its 36 positions
        taken = largest_positions(leads[0, sample], first, allowed)
        assert np.array_equal(weights[1, sample], taken)
        free[sample] &= ~taken
        second = largest_positions(leads[1, sample], 20, free[sample])
        assert np.array_equal(weights[2, sample], second)
        free[sample] &= ~second
    scores = np.stack([np.zeros_like(leads[2]), leads[2]])
    assert np.array_equal(weights[3], free & (scores.argmax(0) == 1))


def test_quota_of_equal_leads_takes_the_first_positions(kernel):
    cond, uncond, _ = random_predictions(1, (1, 4, 5, 6))
    weights = blend(kernel, cond * 2, uncond * 2, quota=[None, 7])[2]
    assert weights[1].flatten().tolist() == [1.0] * 7 + [0.0] * 23


@pytest.mark.parametrize("softness", [None, 1.0])
@pytest.mark.parametrize("sigma", [4518.763671875, 1e6])
def test_scores_of_a_large_sigma_match_the_definition(kernel, sigma, softness):
    """A model with zero terminal SNR begins at such a σ, where scores differ by 1e-5 or less."""
    cond, uncond, _ = random_predictions(3, (2, 4, 64, 48))
    check(kernel, cond, uncond, torch.full((2,), sigma), strength=[1.0, 0.9, 0.8], softness=softness)


def test_rounding_of_constant_maps_does_not_decide_the_mask(kernel):
    """The saliency of both models is constant, so that no model leads anywhere, and rounding must not decide."""
    uncond = [torch.zeros(2, 4, 24, 20)] * 2
    cond = [torch.full((2, 4, 24, 20), value) for value in (0.7, 0.3)]
    for softness, expected in ((None, 0.0), (1.0, 0.5)):
        weights = blend(kernel, cond, uncond, blur=1, bias=[0.0, 1.0], softness=softness)[2]
        assert (weights[1] == expected).all()


@pytest.mark.parametrize("count", [0, 1, 40, 96])
def test_quota_is_the_number_of_positions_where_the_soft_weight_exceeds_that_of_the_base(kernel, count):
    cond, uncond, sigma = random_predictions(2, (2, 4, 12, 8))
    weights = blend(kernel, cond, uncond, sigma, quota=[None, count], softness=0.3)[2]
    assert ((weights[1] > weights[0]).flatten(1).sum(1) == count).all()
    assert count in (0, 96) or weights[1].std() > 0.05


@pytest.mark.parametrize("softness", [None, 0.4])
def test_momentum_averages_the_scaled_saliency(kernel, softness):
    """Saliency is linear in |cond - uncond|: predictions with the weighted mean of two of these differences have the
    weighted mean of the two saliencies. The expected masks are computed from such predictions.
    """
    cond, uncond, sigma = random_predictions(2, (2, 4, 12, 8))
    other = [u + (c - u).abs().mul(0.5 + i).flip(2) for i, (c, u) in enumerate(zip(cond, uncond, strict=True))]
    memory = saliency_blend(other, uncond, sigma, [1.0] * 2, [0.0] * 2, [None] * 2, [1.0] * 2).logits
    mixed = [u + 0.7 * (o - u).abs() + 0.3 * (c - u).abs() for o, c, u in zip(other, cond, uncond, strict=True)]
    expected = blend(kernel, mixed, uncond, sigma, softness=softness)[2]
    got = blend(kernel, cond, uncond, sigma, memory=list(memory), momentum=0.7, softness=softness)[2]
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    half = blend(kernel, cond, uncond, sigma, memory=[None, memory[1]], momentum=0.7, softness=softness)[2]
    expected = blend(kernel, [cond[0], mixed[1]], uncond, sigma, softness=softness)[2]
    torch.testing.assert_close(half, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("given", [dict(bias=[1.0, 0.0]), dict(region=[torch.zeros(()), None]), dict(quota=[3, None])])
def test_bias_region_or_quota_of_the_base_rejected(given):
    cond, uncond, sigma = random_predictions(2, (1, 4, 6, 5))
    arguments = {"bias": [0.0] * 2, "region": [None] * 2} | {k: v for k, v in given.items() if k != "quota"}
    with pytest.raises(ValueError, match="the base cannot have a bias, region or quota"):
        saliency_blend(
            cond, uncond, sigma, [1.0] * 2, arguments["bias"], arguments["region"], [1.0] * 2, quota=given.get("quota")
        )
