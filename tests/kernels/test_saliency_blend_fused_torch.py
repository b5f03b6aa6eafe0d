"""Properties of the fused torch implementation: processing in pieces, equal bits in any order or batch, gradients."""

import itertools

import pytest
import torch

from chorus.kernels.saliency_blend import fused_torch

SHAPES = [(1, 4, 64, 64), (2, 16, 33, 47), (3, 5, 2, 19, 70)]  # the last is a video


def random_predictions(models, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    uncond = [torch.randn(shape, generator=generator).to(dtype) for _ in range(models)]
    cond = [u + torch.randn(shape, generator=generator).to(dtype) for u in uncond]
    return cond, uncond


def blend(cond, uncond, strength=None, bias=None, sigma=None, region=None, **options):
    models = len(cond)
    sigma = torch.linspace(0.5, 3.0, len(cond[0])) if sigma is None else sigma
    gain = options.pop("gain", [1.0] * models)
    options = {"blur": 4, "shared": False, "softness": None, **options}
    return fused_torch.saliency_blend(
        cond,
        uncond,
        sigma,
        strength or [1.0] * models,
        bias or [0.0] * models,
        region or [None] * models,
        gain,
        **options,
    )


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("blur", [3, 4])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_hard_masks_and_scores_are_bit_equal_in_any_order_of_experts(threads, shape, blur, shared):
    cond, uncond = random_predictions(4, shape)
    strength, bias = [1.0, 0.9, 1.1, 1.3], [0.0, 0.02, -0.01, -0.05]
    first = blend(cond, uncond, strength, bias, blur=blur, shared=shared)
    assert first[2].unique().tolist() == [0, 1, 2, 3]
    for order in itertools.permutations((1, 2, 3)):
        order = (0, *order)
        permuted = ([t[i] for i in order] for t in (cond, uncond, strength, bias))
        out_cond, out_uncond, owner, partition, logits, spread = blend(*permuted, blur=blur, shared=shared)
        assert torch.equal(torch.tensor(order, dtype=torch.uint8)[owner.long()], first[2])
        assert torch.equal(out_cond, first[0])
        assert torch.equal(out_uncond, first[1])
        for got, expected in ((partition, first[3]), (logits, first[4]), (spread, first[5])):
            assert torch.equal(got, expected[list(order)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("models", [1, 2, 4])
@pytest.mark.parametrize("softness", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_processing_in_pieces_matches_the_whole(monkeypatch, dtype, softness, models, shape):
    cond, uncond = random_predictions(models, shape, dtype)
    gain = [1.0, 0.5, 2.0, 1.0][:models]
    whole = blend(cond, uncond, softness=softness, gain=gain)
    monkeypatch.setattr(fused_torch, "PIECE", 1000)
    assert next(fused_torch._pieces(cond[0])) is not None
    spread = whole[5][1:].min() if models > 1 else torch.tensor(1.0)
    eps = torch.finfo(torch.float32).eps
    # the sums over channels may be computed in another order, which rounds differently
    logit = 4 * eps * float(whole[4].abs().max())
    # the rounding errors of the scores are divided by the spread
    bound = {2: logit / float(spread) + 4 * eps} if softness else {}
    for n, (piece, full) in enumerate(zip(blend(cond, uncond, softness=softness, gain=gain), whole)):
        if n in bound:
            assert (piece - full).abs().max() <= bound[n]
        elif n < 2 and softness:
            rounding = torch.finfo(dtype).eps + 2 * models * bound[2]
            assert (piece - full).abs().max() <= rounding * max(t.abs().max() for t in (*cond, *uncond)) * 2
        else:
            torch.testing.assert_close(piece, full)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("models", [1, 2, 4])
def test_selected_predictions_keep_every_bit_also_of_negative_zero(models, dtype):
    """Non-finite predictions of a model do not leak into positions that another model owns."""
    cond, uncond = random_predictions(models, (1, 4, 16, 16), dtype)
    for t in (*cond, *uncond):
        t[:, :, ::2] = -0.0
    uncond[-1][:, :, 8] = float("inf")
    out_cond, out_uncond, owner, *_ = blend(cond, uncond)
    for got, choices in ((out_cond, cond), (out_uncond, uncond)):
        picked = torch.stack(choices).gather(0, owner.long()[None, :, None].expand(1, -1, 4, -1, -1))[0]
        bits = fused_torch.BITS[dtype.itemsize]
        assert torch.equal(got.view(bits), picked.view(bits))


@pytest.mark.parametrize("softness", [None, 1.0])
def test_gradients_reach_every_prediction(softness):
    cond, uncond = random_predictions(3, (1, 4, 16, 16))
    bias = [0.0, 0.1, 0.2]
    plain = blend(cond, uncond, bias=bias, softness=softness)
    leaves = [t.clone().requires_grad_() for t in (*cond, *uncond)]
    out = blend(leaves[:3], leaves[3:], bias=bias, softness=softness)
    for a, b in zip(out, plain):
        torch.testing.assert_close(a, b)
    (out[0].sum() + out[1].sum()).backward()
    if softness is None:  # the gradient of each position goes to its owner
        for i in range(3):
            owned = (out[2] == i).unsqueeze(1).expand_as(leaves[i]).float()
            assert torch.equal(leaves[i].grad, owned)
            assert torch.equal(leaves[3 + i].grad, owned)
    assert all(torch.isfinite(t.grad).all() for t in leaves)


def in_float64(call):
    """``call`` with the kernel's float32 replaced by float64."""
    with pytest.MonkeyPatch.context() as patch:
        zeros = torch.zeros
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch, "zeros", lambda *args, **options: zeros(*args, **{**options, "dtype": torch.float64}))
        return call()


@pytest.mark.parametrize("softness", [1.0, 0.2])
@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_gradients_of_a_soft_mask_match_finite_differences(scale, softness):
    """Gradients also pass through the spread, which scales bias and softness."""
    generator = torch.Generator().manual_seed(0)
    uncond, difference, direction = (
        [torch.randn(1, 4, 16, 16, generator=generator) for _ in range(2)] for _ in range(3)
    )
    cond, weights = [u + scale * d for u, d in zip(uncond, difference)], torch.randn(1, 4, 16, 16, generator=generator)
    leaves = [c.clone().requires_grad_() for c in cond]
    (blend(leaves, uncond, bias=[0.0, 0.3], softness=softness)[0] * weights).sum().backward()
    analytic = sum(float((leaf.grad * d).sum()) for leaf, d in zip(leaves, direction))

    def output_at(step):
        shifted = [c.double() + step * d.double() for c, d in zip(cond, direction)]
        out = blend(shifted, [u.double() for u in uncond], bias=[0.0, 0.3], softness=softness)[0]
        return float((out * weights.double()).sum())

    assert analytic == pytest.approx(in_float64(lambda: (output_at(1e-6) - output_at(-1e-6)) / 2e-6), rel=1e-3)


def test_gradients_of_equal_models_are_finite():
    cond, uncond = random_predictions(1, (1, 4, 8, 8))
    leaves = [t.clone().requires_grad_() for t in (*cond * 2, *uncond * 2)]
    blend(leaves[:2], leaves[2:], bias=[0.0, 1.0], softness=1.0)[0].sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in leaves)


@pytest.mark.parametrize("softness", [None, 0.5])
@pytest.mark.parametrize("size", [(64, 64), (33, 200), (256, 192)], ids=str)
def test_samples_of_a_batch_equal_samples_blended_alone(threads, size, softness):
    """Bias and softness are scaled by the spread. Its sums must not depend on the split of work among threads."""
    cond, uncond = random_predictions(3, (3, 4, *size))
    region = torch.rand(3, *size, generator=torch.Generator().manual_seed(1)).log()
    settings = dict(bias=[0.0, 0.4, -0.3], softness=softness, region=[None, region, None])
    for quota in (None, [None, None, size[0] * 5]):
        together = blend(cond, uncond, sigma=torch.tensor([0.5, 1.0, 3.0]), quota=quota, **settings)
        for i, sigma in enumerate((0.5, 1.0, 3.0)):
            one = [[t[i : i + 1] for t in side] for side in (cond, uncond)]
            given = {**settings, "region": [None, region[i : i + 1], None]}
            alone = blend(*one, sigma=torch.tensor([sigma]), quota=quota, **given)
            axes = (0, 0, 0 if softness is None else 1, 1, 1, 1)
            for n, (whole, part, axis) in enumerate(zip(together, alone, axes, strict=True)):
                if softness is None or n > 2:
                    assert torch.equal(whole.narrow(axis, i, 1), part)
                else:  # weighted sums may be rounded differently in the vectorised body of a loop and in its tail
                    torch.testing.assert_close(whole.narrow(axis, i, 1), part)
