"""Gradients through checkpoints in ComfyUI's quantised formats, and through weights dequantised in every call."""

import comfy.model_management
import pytest
import torch

from chorus.tests.support.gradients import direction_of, finite_difference, gradient, seed_sampler
from chorus.tests.support.quantised import FORMATS, ON_THE_FLY, dequantise, load, load_file, lora
from chorus.tests.support.tiny_models import blend, conditioning, ksample, latent

WORDS, EXPERT_WORDS = [tuple(conditioning(i + j, guidance=3.5) for j in (0, 1)) for i in (10, 30)]
SAMPLING = dict(cfg=3.0, scheduler="simple")
# On a CPU, ComfyUI dequantises weights in the formats of SMOOTH, so the sampling is a smooth function of the noise. For
# the formats of ROUNDED, ComfyUI rounds the inputs of a product, and its gradient ignores this rounding.
SMOOTH = ("fp8", "mxfp8", "nvfp4", ON_THE_FLY)
ROUNDED = ("int8", "int8_convrot")
# ComfyUI's product has no derivative in these formats. ComfyUI 0.30 does not have w4a8
WITHOUT_DERIVATIVE = [name for name in ("convrot_w4a4", "w4a8") if name in FORMATS]
HALF = dict(region=(torch.arange(10) < 5).float().expand(1, 12, 10), region_mode="force")


def sampler(model):
    return seed_sampler(model, latent(1, 12, 10, 16), WORDS, **SAMPLING)


def blend_of_halves(name, *, same, load=load):
    """A blend of two models with LoRAs; each generates a fixed half, so the mask does not depend on the noise."""
    base = load(0, name)
    expert = base if same else load(1, name)
    return blend(lora(base, 5), lora(expert, 6), *EXPERT_WORDS, **HALF)[0]


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


def assert_same(got, expected):
    """Two gradients of equal quantised models with LoRAs are equal, up to the rounding of the weights.

    ComfyUI rounds a quantised weight with its LoRA to the format again, so one other last bit of their sum can give the
    next value of the format. This happened twice (int8 and fp8), in processes that had run many other tests, and changed
    the gradient by 0.02 %. If the values of the LoRAs change by 1e-7, about their last bit, the gradient changes by up to
    0.002 %, and by up to 0.3 % if they change by 1e-6.
    """
    assert relative(got, expected) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["alone", "with a LoRA", "two checkpoints", "one checkpoint"])
@pytest.mark.parametrize("name", SMOOTH)
def test_gradient_equals_the_finite_difference(name, setting):
    if setting in ("alone", "with a LoRA"):
        model = load(0, name)
        model = lora(model, 5) if setting == "with a LoRA" else model
    else:
        model = blend_of_halves(name, same=setting == "one checkpoint")
    run = sampler(model)
    _, found = gradient(run)
    direction = direction_of(found)
    expected = finite_difference(run, direction, step=2e-2)
    assert float((found * direction).sum()) == pytest.approx(expected, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUNDED)
def test_gradient_of_rounded_products_is_near_that_of_the_dequantised_model(name):
    (loss, found), (exact_loss, exact) = (
        gradient(sampler(model)) for model in (load(0, name), dequantise(load(0, name)))
    )
    assert abs(float(loss / exact_loss) - 1) < 2e-3
    assert relative(found, exact) < 0.03  # the rounding of the inputs to 8 bits, over three steps


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bound"), [("fp8", 0.05), ("mxfp8", 0.05), ("nvfp4", 0.2)])
def test_gradient_of_products_in_low_precision_is_near_that_of_the_dequantised_model(name, bound):
    """As on a GPU with support for such products: their inputs are rounded to 8 or 4 bits."""
    model = load(0, name)
    for layer in model.model.modules():
        if hasattr(layer, "quant_format"):
            layer._full_precision_mm = False
    (loss, found), (exact_loss, exact) = (gradient(sampler(m)) for m in (model, dequantise(load(0, name))))
    assert float(loss) != float(exact_loss)
    assert relative(found, exact) < bound


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUNDED)
def test_blend_of_one_int8_checkpoint_has_the_gradient_of_two_separate_loads(name):
    _, one = gradient(sampler(blend_of_halves(name, same=True)))
    two = blend(lora(load(0, name), 5), lora(load(0, name), 6), *EXPERT_WORDS, **HALF)[0]
    _, expected = gradient(sampler(two))
    assert_same(one, expected)
    assert relative(gradient(sampler(lora(load(0, name), 5)))[1], one) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8", "int8_convrot"])
def test_models_can_be_unloaded_and_sampled_after_a_gradient(name, tmp_path):
    """ComfyUI unloads models in inference mode, where it cannot remove patches from weights made outside this mode."""
    from_file = blend_of_halves(
        name, same=True, load=lambda seed, name: load_file(seed, name, tmp_path / "flux.safetensors")
    )
    expected = ksample(blend_of_halves(name, same=True), *WORDS, latent(1, 12, 10, 16), **SAMPLING)
    _, first = gradient(sampler(from_file))
    with torch.inference_mode():
        comfy.model_management.unload_all_models()
    assert torch.equal(ksample(from_file, *WORDS, latent(1, 12, 10, 16), **SAMPLING), expected)
    assert_same(gradient(sampler(from_file))[1], first)


@pytest.mark.parametrize("place", ["model", "expert"])
@pytest.mark.parametrize("name", WITHOUT_DERIVATIVE)
def test_format_without_a_derivative_rejected_by_name(name, place):
    model = load(0, name)
    model = model if place == "model" else blend(load(1, "fp8"), model, *EXPERT_WORDS)[0]
    with pytest.raises(ValueError, match=rf"quantised as {FORMATS[name][0]}, which has no gradient.*use mode search"):
        gradient(sampler(model))


def test_every_format_of_comfyui_is_tested():
    from comfy.quant_ops import QUANT_ALGOS

    # float8_e5m2 is not tested: it is an fp8 like float8_e4m3fn, with fewer bits for the mantissa
    tested = {kind for kind, *_ in FORMATS.values()} | {"float8_e5m2"}
    assert set(QUANT_ALGOS) == tested
    assert set(FORMATS) == {*SMOOTH, *ROUNDED, *WITHOUT_DERIVATIVE} - {ON_THE_FLY}
