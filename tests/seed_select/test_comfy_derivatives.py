"""Gradients of models with operations that have no derivative.

If the operation is attention, the gradient is that of exact attention. Other operations are rejected with an error that
names them.
"""

import sys

import comfy.clip_model
import comfy.ldm.flux.math
import comfy.model_management
import pytest
import torch
from comfy.ldm.modules import attention
from torch.nn.functional import normalize

from chorus.demo import modules
from chorus.host.attention import differentiable_attention, straight_through
from chorus.host.gradients import Recorder, gradients
from chorus.tests.support.gradients import (
    direction_of,
    finite_difference,
    gradient,
    loss_of,
    seed_sampler,
    session,
    tiny_encoder,
)
from chorus.tests.support.head_training import Scaled
from chorus.tests.support.seeds import WORDS
from chorus.tests.support.tiers import covering, quick
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
    flux,
    in_inference_mode,
    ksample,
    latent,
    unet,
)

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERT_WORDS = conditioning(30), conditioning(31)


def patch_kernel(func, *args, **kwargs):
    """An attention override like a fast kernel: its result has no autograd graph."""
    with torch.no_grad():
        return func(*args, **kwargs)


def patch_8_bit(func, *args, **kwargs):
    """An override with the rounding of 8 bit attention."""
    with torch.no_grad():
        out = func(*args, **kwargs)
        scale = out.abs().max() / 127
        return (out / scale).round() * scale


def patch_flat(func, q, k, v, *args, **kwargs):
    """An override that computes a function other than attention, without an autograd graph."""
    with torch.no_grad():
        return func(torch.zeros_like(q), k, v, *args, **kwargs)


def patch_sharp(func, q, k, v, *args, **kwargs):
    """An override that computes a function other than attention, with the derivative of this function."""
    return func(2 * q, k, v, *args, **kwargs)


@in_inference_mode
def with_override(model, override):
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


@in_inference_mode
def in_dtype(model, dtype):
    model.model.diffusion_model.to(dtype)
    model.model.diffusion_model.dtype = dtype
    return model


def demo_run(change=lambda model: model):
    with torch.inference_mode():
        model, clip, _ = modules.load_checkpoint("general")
        words = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a cat", "")]
        return seed_sampler(change(model), latent(channels=8), words, cfg=4.0)


def blended(base, expert):
    region = (torch.arange(16) < 8).float().expand(1, 16, 16).clone()
    return blend(base, expert, *EXPERT_WORDS, region=region, region_mode="force")[0]


OVERRIDDEN = {
    "unet": lambda change: seed_sampler(change(unet(0))),
    "flux": lambda change: seed_sampler(change(flux(3))),
    "expert": lambda change: seed_sampler(blended(unet(0), change(unet(1)))),
}


@covering(case=[*OVERRIDDEN], checkpoint={"checkpointed": True, "plain": False})
def test_gradient_with_an_attention_kernel_without_derivative_is_that_of_exact_attention(case, checkpoint):
    _, expected = gradient(OVERRIDDEN[case](lambda m: m), steps=2, checkpoint=checkpoint)
    _, found = gradient(OVERRIDDEN[case](lambda m: with_override(m, patch_kernel)), steps=2, checkpoint=checkpoint)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.slow
def test_session_with_an_8_bit_kernel_equals_ksampler_with_it_bit_for_bit():
    model = with_override(unet(0), patch_8_bit)
    run = seed_sampler(model)
    found = session(run, lambda s: s.to_latent(s.generate(run.noise_of(5).requires_grad_(True))[-1]).detach())
    assert torch.equal(found, ksample(model, *WORDS, latent(), seed=5))
    assert not torch.equal(found, ksample(unet(0), *WORDS, latent(), seed=5))
    expected = gradient(seed_sampler(unet(0)))[1]
    assert (gradient(run)[1] - expected).norm() < 0.1 * expected.norm()


def test_gradient_includes_the_derivative_of_an_override():
    run = seed_sampler(with_override(unet(0), patch_sharp))
    _, found = gradient(run)
    direction = direction_of(found)
    assert float((found * direction).sum()) == pytest.approx(finite_difference(run, direction), rel=5e-3)
    plain = gradient(seed_sampler(unet(0)))[1]
    assert (found - plain).norm() > 0.1 * plain.norm()


def test_override_of_another_function_without_derivative_rejected_by_name():
    with pytest.raises(ValueError, match=r"attention of patch_flat has no derivative.*remove it.*mode search"):
        gradient(seed_sampler(with_override(unet(0), patch_flat)))


def fast_attention(q, k, v, heads, mask=None, **kwargs):
    with torch.no_grad():
        return attention.attention_pytorch.__wrapped__(q, k, v, heads, mask, **kwargs)


@pytest.fixture
def fast_kernel(monkeypatch):
    """ComfyUI as started with an option for an attention kernel without a derivative."""
    kernel, exact = attention.wrap_attn(fast_attention), attention.optimized_attention
    for module in list(sys.modules.values()):
        for name in ("optimized_attention", "optimized_attention_masked"):
            if getattr(module, "__dict__", {}).get(name) is exact:
                monkeypatch.setattr(module, name, kernel)
    return kernel


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: unet(0), lambda: flux(3)], ids=["unet", "flux"])
def test_gradient_with_a_start_option_for_a_kernel_without_derivative_is_that_of_exact_attention(make, request):
    _, expected = gradient(seed_sampler(make()))
    kernel = request.getfixturevalue("fast_kernel")
    _, found = gradient(seed_sampler(make()))
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert attention.optimized_attention is comfy.ldm.flux.math.optimized_attention is kernel  # restored


def test_image_encoder_with_a_kernel_without_derivative_has_the_gradient_of_exact_attention(fast_kernel, monkeypatch):
    image = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(1))

    def embedded(s):
        x = image.clone().requires_grad_(True)
        (normalize(s.embed(x), dim=-1) * torch.linspace(-1, 1, 16)).sum().backward()
        return x.grad

    run = seed_sampler(unet(0))
    expected = session(run, embedded, clip_vision=tiny_encoder())
    # as in newer versions of ComfyUI, which also use the kernel of the start options for image encoders
    monkeypatch.setattr(
        comfy.clip_model, "optimized_attention_for_device", lambda *a, **k: attention.optimized_attention
    )
    found = session(run, embedded, clip_vision=tiny_encoder())
    assert expected.norm() > 0
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_attention_is_bit_equal_without_gradients():
    q, k, v = torch.randn(3, 1, 8, 32, generator=torch.Generator().manual_seed(1)).unbind(0)
    with gradients(), differentiable_attention():
        out = straight_through(fast_attention, q, k, v, 2)
        assert torch.equal(out, fast_attention(q, k, v, 2))
        assert not out.requires_grad


# operations other than attention


class WithoutGraph(torch.nn.Module):
    """A layer like one with a custom kernel: its result has no autograd graph."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        with torch.no_grad():
            return self.layer(*args, **kwargs)


class MLPKernelNode:
    @staticmethod
    def patch(model, name):
        out = model.clone()
        out.add_object_patch(name, WithoutGraph(model.get_model_object(name)))
        return out


def flux_with_kernel():
    return MLPKernelNode.patch(flux(3), "diffusion_model.single_blocks.0.linear2")


def unet_with_kernel():
    return MLPKernelNode.patch(unet(0), "diffusion_model.middle_block.1.transformer_blocks.0.ff")


class DetachedTokensNode:
    @staticmethod
    def execute(model):
        out = model.clone()

        def drop(q, k, v, extra_options):
            return q.detach(), k, v

        out.set_model_attn2_patch(drop)
        return out


@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpointed", "plain"])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (flux_with_kernel, "WithoutGraph"),
        (unet_with_kernel, "WithoutGraph"),
        (lambda: DetachedTokensNode.execute(unet(0)), "DetachedTokensNode"),
        (lambda: blended(unet(0), DetachedTokensNode.execute(unet(1))), "DetachedTokensNode"),
    ],
    ids=["flux layer", "unet layer", "patch", "patch on an expert"],
)
def test_operation_without_derivative_rejected_by_name(make, name, checkpoint):
    with pytest.raises(ValueError, match=rf"gradient of the denoiser is wrong.*{name}.*remove it.*or use mode search"):
        gradient(seed_sampler(in_inference_mode(make)()), checkpoint=checkpoint)


def test_rotary_embedding_without_derivative_rejected(monkeypatch):
    exact = comfy.ldm.flux.math.apply_rope

    def fused(*args):
        with torch.no_grad():
            return exact(*args)

    monkeypatch.setattr(comfy.ldm.flux.math, "apply_rope", fused)
    with pytest.raises(ValueError, match=r"gradient of the denoiser is wrong.*an operation of Flux.*mode search"):
        gradient(seed_sampler(flux(3)))


def test_custom_operation_that_cannot_be_differentiated_rejected_by_name():
    @torch.library.custom_op("chorus_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def attend_twice(q, k, v, extra_options):
        return twice(q), k, v

    model = unet(0).clone()
    model.set_model_attn2_patch(attend_twice)
    for checkpoint in (True, False):
        with pytest.raises(ValueError, match=r"no gradient flows through the denoiser.*test_custom_operation.*remove"):
            gradient(seed_sampler(model), checkpoint=checkpoint)


def hard(base, expert):
    return blend(base, expert, *EXPERT_WORDS)[0]


@pytest.mark.parametrize("dtype", quick([torch.float16], [torch.float32, torch.float16, torch.bfloat16]), ids=str)
@pytest.mark.parametrize(
    "case",
    quick(["v", "flux", "soft blend"], ["eps", "v", "flow", "flux", "hard blend", "soft blend", "demo"]),
)
def test_correct_gradients_are_not_rejected(case, dtype):
    """Finite differences are less accurate in 16 bits and with masks that flip; the check must allow for this."""
    make = {
        "eps": lambda: unet(0),
        "v": lambda: unet(1, "v"),
        "flow": lambda: unet(2, "flow"),
        "flux": lambda: flux(3),
        "hard blend": lambda: hard(in_dtype(unet(0), dtype), in_dtype(unet(1), dtype)),
        "soft blend": lambda: blend(unet(0), in_dtype(unet(1), dtype), *EXPERT_WORDS, mask_mode="soft")[0],
    }
    run = demo_run(lambda m: in_dtype(m, dtype)) if case == "demo" else seed_sampler(in_dtype(make[case](), dtype))
    for last_steps in (None, 1):
        _, found = gradient(run, steps=2, last_steps=last_steps)
        assert found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_layer_without_derivative_rejected_in_16_bits(dtype):
    model = in_dtype(unet(0), dtype)
    with pytest.raises(ValueError, match=r"gradient of the denoiser is wrong.*WithoutGraph"):
        gradient(seed_sampler(MLPKernelNode.patch(model, "diffusion_model.middle_block.1")))


def test_gradient_is_compared_once_in_a_session():
    run = seed_sampler(unet(0))

    def work(s):
        for seed in (3, 4):
            loss_of(s.generate(run.noise_of(seed).requires_grad_(True))).backward()

    session(run, work)
    assert run.counter.compared == 3 * 2  # three calls; guidance doubles the rows
    run = seed_sampler(unet(0))
    session(run, work, checkpoint=False)
    assert run.counter.compared == 2 * 2  # two calls: the activations of the first call are saved


def test_small_gradients_do_not_underflow_in_float16():
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).half()
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(2)).requires_grad_(True)

    def layer(x):
        return ((x.half() @ weight) @ weight).float()

    def gradient_of(scale):
        (scale * Recorder()("test", layer, x)).sum().backward()
        found, x.grad = x.grad / scale, None
        return found

    assert torch.equal(gradient_of(2.0**-24), gradient_of(1.0))


# --fp16-intermediates


@pytest.fixture
def fp16_intermediates(monkeypatch):
    monkeypatch.setattr(comfy.model_management.args, "fp16_intermediates", True)


def test_decoding_with_fp16_intermediates_rounds_as_the_vae_and_has_the_gradient_of_float32(monkeypatch):
    with torch.inference_mode():
        vae = modules.load_checkpoint("general")[2]
    latents = 0.3 * torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))

    def work(s):
        z = latents.clone().requires_grad_(True)
        image = s.decode(z)
        (2.0**-30 * image * weights).sum().backward()  # gradients below the smallest number of float16
        return image.detach(), z.grad * 2.0**30

    _, expected = session(seed_sampler(unet(0, latent_format=Scaled)), work, vae=vae)
    monkeypatch.setattr(comfy.model_management.args, "fp16_intermediates", True)
    image, found = session(seed_sampler(unet(0, latent_format=Scaled)), work, vae=vae)
    with torch.inference_mode():
        decoded = vae.decode(latents)
    assert decoded.dtype == torch.float16
    assert torch.equal(image, decoded.float())
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_noise_of_a_float16_latent_is_float32_and_samples_as_ksampler_bit_for_bit(fp16_intermediates):
    model, samples = unet(0), {"samples": torch.zeros(1, 4, 16, 16, dtype=torch.float16)}
    run = seed_sampler(model, samples)
    noise = run.noise_of(5)
    assert noise.dtype == torch.float32
    found = run.generate(noise)
    assert found.dtype == torch.float16
    assert torch.equal(found, ksample(model, *WORDS, samples, seed=5))
    assert run.to_model(found).dtype == torch.float32
