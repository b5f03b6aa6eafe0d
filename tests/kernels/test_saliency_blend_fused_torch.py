"""What only the torch path of the kernel does: pieces, bits, and a score that does not know its place."""

import itertools

import pytest
import torch

from chorus.kernels.saliency_blend import fused_torch

SHAPES = [(1, 4, 64, 64), (2, 16, 33, 47), (3, 5, 2, 19, 70)]  # the last a video


def draw(models, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    uncond = [torch.randn(shape, generator=generator).to(dtype) for _ in range(models)]
    cond = [u + torch.randn(shape, generator=generator).to(dtype) for u in uncond]
    return cond, uncond


def blend(cond, uncond, strength=None, bias=None, **options):
    models = len(cond)
    sigma = torch.linspace(0.5, 3.0, len(cond[0]))
    gain = options.pop("gain", [1.0] * models)
    options = {"blur": 4, "shared": False, "softness": None, **options}
    return fused_torch.saliency_blend(
        cond, uncond, sigma, strength or [1.0] * models, bias or [0.0] * models, [None] * models, gain, **options
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
def test_hard_masks_and_scores_are_bit_equal_in_any_order_of_the_experts(threads, shape, blur, shared):
    cond, uncond = draw(4, shape)
    strength, bias = [1.0, 0.9, 1.1, 1.3], [0.0, 0.02, -0.01, -0.05]
    first = blend(cond, uncond, strength, bias, blur=blur, shared=shared)
    assert first[2].unique().tolist() == [0, 1, 2, 3]
    for order in itertools.permutations((1, 2, 3)):
        order = (0, *order)
        turned = ([t[i] for i in order] for t in (cond, uncond, strength, bias))
        out_cond, out_uncond, owner, partition = blend(*turned, blur=blur, shared=shared)
        assert torch.equal(torch.tensor(order, dtype=torch.uint8)[owner.long()], first[2])
        assert torch.equal(out_cond, first[0])
        assert torch.equal(out_uncond, first[1])
        assert torch.equal(partition, first[3][list(order)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("models", [1, 2, 4])
@pytest.mark.parametrize("softness", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pieces_are_the_whole(monkeypatch, dtype, softness, models, shape):
    cond, uncond = draw(models, shape, dtype)
    gain = [1.0, 0.5, 2.0, 1.0][:models]
    whole = blend(cond, uncond, softness=softness, gain=gain)
    monkeypatch.setattr(fused_torch, "PIECE", 1000)
    assert next(fused_torch._pieces(cond[0])) is not None
    for piece, all_of_it in zip(blend(cond, uncond, softness=softness, gain=gain), whole):
        torch.testing.assert_close(piece, all_of_it)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("models", [1, 2, 4])
def test_bits_of_predictions_are_kept_even_of_negative_zero(models, dtype):
    """And what a model that owns a position predicts elsewhere, finite or not, does not leak into it."""
    cond, uncond = draw(models, (1, 4, 16, 16), dtype)
    for t in (*cond, *uncond):
        t[:, :, ::2] = -0.0
    uncond[-1][:, :, 8] = float("inf")
    out_cond, out_uncond, owner, _ = blend(cond, uncond)
    for got, choices in ((out_cond, cond), (out_uncond, uncond)):
        picked = torch.stack(choices).gather(0, owner.long()[None, :, None].expand(1, -1, 4, -1, -1))[0]
        bits = fused_torch.BITS[dtype.itemsize]
        assert torch.equal(got.view(bits), picked.view(bits))


@pytest.mark.parametrize("softness", [None, 1.0])
def test_gradients_pass(softness):
    cond, uncond = draw(3, (1, 4, 16, 16))
    bias = [0.0, 0.1, 0.2]
    plain = blend(cond, uncond, bias=bias, softness=softness)
    leaves = [t.clone().requires_grad_() for t in (*cond, *uncond)]
    out = blend(leaves[:3], leaves[3:], bias=bias, softness=softness)
    for a, b in zip(out, plain):
        torch.testing.assert_close(a, b)
    (out[0].sum() + out[1].sum()).backward()
    if softness is None:  # every position hands its gradient to its owner
        for i in range(3):
            owned = (out[2] == i).unsqueeze(1).expand_as(leaves[i]).float()
            assert torch.equal(leaves[i].grad, owned)
            assert torch.equal(leaves[3 + i].grad, owned)
    assert all(torch.isfinite(t.grad).all() for t in leaves)
