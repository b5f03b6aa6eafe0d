"""The kernel, in each of its implementations, against the definition in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from chorus.kernels.saliency_blend import fused_torch, reference, saliency_blend
from chorus.tests.support.blend_definition import definition

INF = float("inf")


def by_reference(cond, *args, **kwargs):
    """The written-out implementation; it always forms the weights."""
    return reference.saliency_blend(cond, *args, **kwargs)


def by_fused_torch(cond, *args, **kwargs):
    out_cond, out_uncond, weights, _ = fused_torch.saliency_blend(cond, *args, **kwargs)
    if weights.dtype == torch.uint8:
        weights = torch.stack([weights == i for i in range(len(cond))]).float()
    return out_cond, out_uncond, weights


@pytest.fixture(params=[by_reference, by_fused_torch], ids=["reference", "fused torch"])
def kernel(request):
    return request.param


def draw(models, shape, dtype=torch.float32, seed=0):
    """(cond, uncond) of every model and σ [B]; the predictions of one model differ more than those of another."""
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


def check(kernel, cond, uncond, sigma, strength=None, gain=None, bias=None, region=None, **options):
    zeros, ones = [0.0] * len(cond), [1.0] * len(cond)
    strength, gain, bias, region = strength or ones, gain or ones, bias or zeros, region or [None] * len(cond)
    out_cond, out_uncond, weights = blend(kernel, cond, uncond, sigma, strength, bias, region, gain, **options)
    assert out_cond.dtype == out_uncond.dtype == cond[0].dtype
    call = SimpleNamespace(x=torch.zeros_like(cond[0]), sigma=sigma)
    expected = definition(
        call,
        list(zip(cond, uncond, strict=True)),
        strengths=strength,
        guidance=[1.0] * len(cond),
        saliency="shared" if options.get("shared") else "own",
        blur=options.get("blur", 4),
        extra=np.stack(
            [
                b + np.broadcast_to(0.0 if r is None else r.double().numpy(), weights.shape[1:])
                for b, r in zip(bias, region)
            ]
        ),
        softness=options.get("softness"),
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
    for got, want in ((out_cond, ((u + factors * (c - u)) * w).sum(0)), (out_uncond, (u * w).sum(0))):
        bound = 4 * rounding * largest + 3 * expected.weight_bound * largest
        assert ((got.double() - want).abs() <= bound).movedim(1, 0)[:, certain].all()


SHAPES = [(1, 4, 5, 7), (2, 16, 9, 4), (3, 1, 13, 6), (2, 4, 32, 48)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("models", [2, 3, 5])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("softness", [None, 1.0, 0.05])
def test_is_the_definition(kernel, shape, models, shared, softness):
    cond, uncond, sigma = draw(models, shape)
    strength = [0.5 + 0.4 * i for i in range(models)]
    gain = [1.0, 0.5, 2.0, 1.0, 1.5][:models]
    generator = torch.Generator().manual_seed(1)
    maps = [0.1 * torch.rand(shape[0], *shape[2:], generator=generator) for _ in range(2, models)]
    region = [None, 0.02 * torch.rand(1, *shape[2:], generator=generator), *maps]  # one for all, one for each sample
    bias = [-0.05 * i for i in range(models)]
    check(kernel, cond, uncond, sigma, strength, gain, bias, region, shared=shared, softness=softness)


@pytest.mark.parametrize("blur", [1, 2, 3, 4, 5, 8])
def test_blur_is_the_definition(kernel, blur):
    cond, uncond, sigma = draw(2, (2, 4, 11, 14))
    check(kernel, cond, uncond, sigma, blur=blur)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softness", [None, 1.0])
def test_half_precision_is_computed_in_float32(kernel, dtype, softness):
    """Rounding the differences themselves would move the mask."""
    cond, uncond, sigma = draw(3, (2, 4, 24, 20), dtype)
    check(kernel, cond, uncond, sigma, [2.0, 3.0, 2.5], softness=softness)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_hard_mask_keeps_every_bit(dtype):
    cond, uncond, sigma = draw(3, (2, 4, 12, 10), dtype)
    out = saliency_blend(cond, uncond, sigma, [1.0] * 3, [0.0] * 3, [None] * 3, [1.0] * 3)
    owner = out.weights.long()
    assert owner.unique().tolist() == [0, 1, 2]
    for got, choices in ((out.cond, cond), (out.uncond, uncond)):
        picked = torch.stack(choices).gather(0, owner[None, :, None].expand(1, -1, 4, -1, -1))[0]
        assert torch.equal(got, picked)


def test_strength_times_saliency_is_what_counts(kernel):
    """Without a bias a model that is twice as salient everywhere, at half the strength, is the same competitor."""
    cond, uncond, _ = draw(2, (1, 4, 12, 10))
    louder = uncond[1] + 2 * (cond[1] - uncond[1])
    weights = [blend(kernel, [cond[0], c], uncond, strength=[1.0, k])[2] for c, k in ((cond[1], 1.0), (louder, 0.5))]
    assert torch.equal(*weights)


def test_ties_go_to_the_base_then_to_chain_order(kernel):
    cond, uncond, _ = draw(1, (2, 4, 9, 8))
    weights = blend(kernel, cond * 3, uncond * 3)[2]
    assert weights[0].all()
    weights = blend(kernel, cond * 3, uncond * 3, bias=[0.0, 1.0, 1.0])[2]
    assert weights[1].all()


@pytest.mark.parametrize("softness", [None, 1.0])
def test_infinite_region_forces_and_bars(kernel, softness):
    cond, uncond, _ = draw(3, (1, 4, 6, 6))
    forced = torch.full((1, 6, 6), -INF)
    forced[:, :3] = INF
    weights = blend(kernel, cond, uncond, region=[None, forced, torch.full((), -INF)], softness=softness)[2]
    assert (weights[1, :, :3] == 1).all()
    assert (weights[0, :, 3:] == 1).all()
    assert not weights[2].any()


def test_two_forced_at_one_position(kernel):
    cond, uncond, _ = draw(3, (1, 4, 6, 6))
    both = [None, torch.full((), INF), torch.full((), INF)]
    assert blend(kernel, cond, uncond, region=both)[2][1].all()
    soft = blend(kernel, cond, uncond, region=both, softness=1.0)[2]
    assert torch.equal(soft[:, 0, 0, 0], torch.tensor([0.0, 0.5, 0.5]))


@pytest.mark.parametrize("softness", [None, 1.0])
def test_samples_of_a_batch_do_not_see_each_other(kernel, softness):
    cond, uncond, sigma = draw(3, (3, 4, 9, 8))
    together = blend(kernel, cond, uncond, sigma, softness=softness)
    for i in range(3):
        alone = blend(
            kernel, [c[i : i + 1] for c in cond], [u[i : i + 1] for u in uncond], sigma[i : i + 1], softness=softness
        )
        for whole, part, axis in zip(together, alone, (0, 0, 1), strict=True):
            torch.testing.assert_close(whole.narrow(axis, i, 1), part)


@pytest.mark.parametrize("softness", [None, 1.0])
def test_strided_inputs_are_read_and_left_alone(kernel, softness):
    cond, uncond, sigma = draw(2, (2, 4, 9, 8))
    strided = [[t.transpose(2, 3).contiguous().transpose(2, 3) for t in ts] for ts in (cond, uncond)]
    before = [[t.clone() for t in ts] for ts in strided]
    got = blend(kernel, *strided, sigma, softness=softness, gain=[1.0, 2.0])
    wanted = blend(kernel, cond, uncond, sigma, softness=softness, gain=[1.0, 2.0])
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w)
    assert all(
        torch.equal(a, b) for now, old in zip(strided, before, strict=True) for a, b in zip(now, old, strict=True)
    )


@pytest.mark.parametrize("softness", [None, 1.0])
def test_every_frame_of_a_video_is_a_sample(kernel, softness):
    cond, uncond, sigma = draw(2, (2, 4, 3, 9, 8))
    region = [None, 0.1 * torch.rand(2, 3, 9, 8, generator=torch.Generator().manual_seed(1))]
    video = blend(kernel, cond, uncond, sigma, region=region, softness=softness)
    assert video[0].shape == video[1].shape == (2, 4, 3, 9, 8)
    assert video[2].shape == (2, 2, 3, 9, 8)
    for t in range(3):
        frames = [[p[:, :, t] for p in side] for side in (cond, uncond)]
        picture = blend(kernel, *frames, sigma, region=[None, region[1][:, t]], softness=softness)
        for whole, part in zip(video, picture, strict=True):
            torch.testing.assert_close(whole[:, :, t], part)


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (3, 3)], ids=str)
def test_a_picture_smaller_than_the_blur(kernel, size):
    cond, uncond, sigma = draw(2, (1, 4, *size))
    out_cond, _, weights = blend(kernel, cond, uncond, sigma, blur=12)
    assert torch.isfinite(out_cond).all()
    assert torch.equal(weights.sum(0), torch.ones(1, *size))


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
@pytest.mark.parametrize("side", ["cond", "uncond"])
@pytest.mark.parametrize("model", [0, 1])
@pytest.mark.parametrize("softness", [None, 1.0])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_partition_tells_which_prediction_is_not_finite(shared, softness, model, side, value):
    cond, uncond, sigma = draw(2, (2, 4, 6, 5))
    {"cond": cond, "uncond": uncond}[side][model][1, 2, 3, 4] = value
    out = saliency_blend(
        cond, uncond, sigma, [1.0] * 2, [0.0] * 2, [None] * 2, [1.0] * 2, shared=shared, softness=softness
    )
    finite = torch.isfinite(out.partition)
    assert not finite[model, 1]
    assert finite[:, 0].all()
    # under `shared` every model is measured against the base's negative
    others = shared and model == 0 and side == "uncond"
    assert finite[1 - model, 1] == (not others)


def test_partition_of_finite_predictions_is_finite():
    cond, uncond, sigma = draw(3, (2, 4, 6, 5))
    out = saliency_blend(cond, uncond, sigma, [1e3, 1e-3, 1.0], [0.0] * 3, [None] * 3, [1.0] * 3, shared=True)
    assert torch.isfinite(out.partition).all()
