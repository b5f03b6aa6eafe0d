"""Experts of another parametrisation receive the same noisy latent, at the same ratio of noise to signal."""

from dataclasses import replace

import comfy.model_sampling
import comfy.samplers
import numpy as np
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

from chorus.host.parametrization import FLOW as FLOW_KIND
from chorus.host.parametrization import VE as VE_KIND
from chorus.host.parametrization import VP as VP_KIND
from chorus.host.parametrization import any_family, family
from chorus.tests.support.blend_definition import CFG, FLOAT32, definition
from chorus.tests.support.host_definition import check_step, run
from chorus.tests.support.tiers import covering
from chorus.tests.support.tiny_models import (
    blend,
    cogvideox,
    conditioning,
    flux,
    forwards,
    in_inference_mode,
    ksample,
    latent,
    pixart,
    predictions,
    recording,
    unet,
)

PROMPTS, EXPERT_PROMPTS = [(conditioning(i), conditioning(i + 1)) for i in (10, 30)]
EVERYWHERE = dict(region=torch.ones(1, 8, 8), region_mode="force")
# models with x = x0 + σ n; for "vp" models, x = (x0 + σ n) / sqrt(1 + σ²); for "flow" models, x = (1 - σ) x0 + σ n
VE = {"eps", "v"}


@pytest.fixture(scope="module")
def models():
    return {kind: (unet(0, kind), unet(1, kind)) for kind in ("eps", "v", "vp", "flow")}


def converted(x, sigma, source, target, sigma_max):
    """(x, σ) converted from the ``source`` to the ``target`` parametrisation, in float64."""
    x, sigma = x.double(), sigma.double().reshape(-1, 1, 1, 1)
    if source == target:
        return x, sigma.flatten()
    if source == "vp":
        return converted(x * (1 + sigma**2).sqrt(), sigma, "v", target, sigma_max)
    if target == "vp":
        x, sigma = converted(x, sigma, source, "v", sigma_max)
        return x / (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1), sigma
    if (source in VE) == (target in VE):
        return x, sigma.flatten()
    if target == "flow":
        return x / (1 + sigma), (sigma / (1 + sigma)).flatten()
    ratio = sigma / (1 - sigma)
    # above the target's range, σ becomes the highest σ of the range, and x is scaled to the amplitude at that σ
    beyond = ratio > sigma_max
    at_end = x * ((1 + sigma_max**2) / ((1 - sigma) ** 2 + sigma**2)).sqrt()
    return torch.where(beyond, at_end, x / (1 - sigma)), ratio.clamp(max=sigma_max).flatten()


@in_inference_mode
def recording_inputs(model):
    """A clone of ``model``, and a list to which every input (x, σ) of its network is appended."""
    inputs, out = [], model.clone()

    def wrapper(apply, params):
        inputs.append((params["input"].clone(), params["timestep"].clone()))
        return apply(params["input"], params["timestep"], **params["c"])

    out.set_model_unet_function_wrapper(wrapper)
    return out, inputs


@in_inference_mode
def sample(model, sigmas, prompts=PROMPTS):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*prompts)
    guider.set_cfg(CFG)
    noise = torch.randn(2, 4, 12, 10, generator=torch.Generator().manual_seed(1))
    return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, seed=1)


SIGMAS = {
    "eps": [14.6, 3.0, 0.5, 0.05, 0.0],
    "v": [14.6, 3.0, 0.5, 0.05, 0.0],
    "vp": [14.6, 3.0, 0.5, 0.05, 0.0],
    "flow": [1.0, 0.95, 0.7, 0.3, 0.04, 0.0],
}


@covering(source=["eps", "v", "vp", "flow"], target=["eps", "v", "vp", "flow"])
def test_expert_gets_the_converted_x_and_sigma(models, source, target):
    base, expert = models[source][0], models[target][1]
    recorder, inputs = recording_inputs(expert)
    model, trace = blend(base, recorder, *EXPERT_PROMPTS)
    model, calls = recording(model)
    sample(model, torch.tensor(SIGMAS[source]))
    assert len(inputs) == len(calls) == len(SIGMAS[source]) - 1

    sigma_max = float(expert.get_model_object("model_sampling").sigma_max)
    expert_inputs = []
    for call, (x, sigma) in zip(calls, inputs, strict=True):
        expected_x, expected_sigma = converted(call.x, call.sigma, source, target, sigma_max)
        rows = len(call.x)
        np.testing.assert_allclose(sigma[:rows].double(), expected_sigma, rtol=4 * FLOAT32)
        np.testing.assert_allclose(x[:rows].double(), expected_x, rtol=8 * FLOAT32, atol=0)
        assert torch.equal(x[:rows], x[rows:])  # both prompts have the same input
        expert_inputs.append((x[:rows], sigma[:rows]))

    base_predictions = predictions(base, *PROMPTS, calls)
    remaining = iter(expert_inputs)
    expert_predictions = predictions(expert, *EXPERT_PROMPTS, calls, mapping=lambda x, sigma: next(remaining))
    for i, call in enumerate(calls):
        # the saliency of every model is |cond - uncond| divided by the σ of the base
        pairs = [(a[i].cond, a[i].uncond) for a in (base_predictions, expert_predictions)]
        check_step(trace.record, i, call, definition(call, pairs, strengths=[1, 1], guidance=[CFG] * 2))


def test_expert_is_left_out_below_its_lowest_sigma(models):
    """The lowest σ is 0.001 for the flow base and 0.029 for the eps expert."""
    base, expert = models["flow"][0], models["eps"][1]
    model, trace = blend(base, expert, *EXPERT_PROMPTS, **EVERYWHERE)
    with forwards(expert) as rows:
        sample(model, torch.tensor([0.9, 0.5, 0.02, 0.01, 0.0]))
    assert [s.models for s in trace.record.steps] == [(0, 1), (0, 1), (0,), (0,)]
    assert len(rows) == 2


def test_percent_ranges_of_the_experts_prompt_use_the_sigmas_of_the_expert(models):
    """Percent 0.5 of the eps expert is σ = 1.6. The flow base reaches this noise level between its σ 0.7 and 0.5."""
    base, expert = models["flow"][0], models["eps"][1]
    positive = [
        *conditioning(50, start_percent=0.0, end_percent=0.5),
        *conditioning(51, start_percent=0.5, end_percent=1.0),
    ]
    model, calls = recording(blend(base, expert, positive, EXPERT_PROMPTS[1], **EVERYWHERE)[0])
    sample(model, torch.tensor([0.9, 0.7, 0.5, 0.0]))
    middle = expert.get_model_object("model_sampling").percent_to_sigma(0.5)
    for call in calls:
        x, sigma = (t.float() for t in converted(call.x, call.sigma, "flow", "eps", 14.6))
        prompt = positive[:1] if sigma[0] > middle else positive[1:]
        prompt = [[prompt[0][0], {"pooled_output": prompt[0][1]["pooled_output"]}]]
        (alone,) = predictions(
            expert, prompt, EXPERT_PROMPTS[1], [call], mapping=lambda *_, x=x, sigma=sigma: (x, sigma)
        )
        torch.testing.assert_close(call.cond, alone.cond, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kinds", [("v", "vp"), ("vp", "v")], ids="-".join)
def test_cogvideox_and_v_prediction_of_one_network_predict_the_same(kinds):
    """ComfyUI's v-prediction scales x to unit variance. CogVideoX expects an x that already has unit variance."""
    base, expert = (unet(1, kind) for kind in kinds)
    model, calls = recording(blend(base, expert, *PROMPTS, **EVERYWHERE)[0])
    sample(model, torch.tensor(SIGMAS["v"]))
    for call, alone in zip(calls, predictions(base, *PROMPTS, calls), strict=True):
        torch.testing.assert_close(call.cond, alone.cond, rtol=1e-4, atol=1e-4)


def test_blend_of_two_cogvideox_models_matches_the_definition():
    """The frames of a video are blended one by one, starting at σ = 4519."""

    def frames(x):
        return x.movedim(2, 1).flatten(0, 1)

    models, prompts = [cogvideox(0), cogvideox(1)], [PROMPTS, EXPERT_PROMPTS]
    model, trace = blend(*models, *EXPERT_PROMPTS)
    model, calls = recording(model)
    ksample(model, *PROMPTS, {"samples": torch.zeros(1, 16, 2, 8, 8)}, scheduler="simple")
    assert calls[0].sigma[0] > 4000
    alone = [predictions(m, *p, calls) for m, p in zip(models, prompts, strict=True)]
    for i, call in enumerate(calls):
        sigma, denoised = call.sigma.repeat_interleave(2), frames(call.denoised).double().numpy()
        call = replace(call, x=frames(call.x), sigma=sigma)
        pairs = [(frames(a[i].cond), frames(a[i].uncond)) for a in alone]
        expected = definition(call, pairs, strengths=[1, 1], guidance=[CFG] * 2)
        assert expected.certain.mean() > 0.99
        shares = trace.record.shares(i).double().numpy()[:, 0]
        assert np.array_equal(shares[:, expected.certain], expected.weights[:, expected.certain])
        error = np.abs(denoised - expected.guided) / expected.bound
        assert error.swapaxes(0, 1)[:, expected.certain].max() <= 1.0


def v(sigma, x0, n):
    return (n - sigma * x0) / (1 + sigma**2) ** 0.5


# for every noise process of ComfyUI: the kind of x that its models expect, and the output of a perfect network at x
PROCESSES = {
    "EPS": (VE_KIND, lambda sigma, x0, n: n),
    "V_PREDICTION": (VE_KIND, v),
    "V_PREDICTION_DDPM": (VP_KIND, v),
    "EDM": (VE_KIND, lambda sigma, x0, n: -v(sigma, x0, n)),
    "X0": (VE_KIND, lambda sigma, x0, n: x0),
    "COSMOS_RFLOW": (VE_KIND, lambda sigma, x0, n: n - x0),
    "CONST": (FLOW_KIND, lambda sigma, x0, n: n - x0),
    "IMG_TO_IMG": (None, None),
    "IMG_TO_IMG_FLOW": (None, None),
}


def test_every_noise_process_of_comfyui_is_supported_or_refused():
    classes = {
        name: kind
        for name, kind in vars(comfy.model_sampling).items()
        if isinstance(kind, type) and hasattr(kind, "calculate_denoised")
    }
    assert classes.keys() == PROCESSES.keys()
    generator = torch.Generator().manual_seed(0)
    x0, n = (torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    for name, (kind, output) in PROCESSES.items():
        process = type("Process", (classes[name],), {"sigma_data": 1.0})()
        if kind is None:
            with pytest.raises(ValueError, match="image-to-image"):
                any_family(process)
            continue
        assert any_family(process) == kind, name
        for sigma in (torch.tensor([s], dtype=torch.float64) for s in (0.9, 0.3)):
            signal, noise = {
                VE_KIND: (1.0, sigma),
                VP_KIND: ((1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5),
                FLOW_KIND: (1 - sigma, sigma),
            }[kind]
            got = process.calculate_denoised(sigma, output(sigma, x0, n), signal * x0 + noise * n)
            torch.testing.assert_close(got, x0, rtol=1e-9, atol=1e-9, msg=name)


def test_only_the_blend_supports_cogvideox():
    with pytest.raises(ValueError, match="CogVideoX"):
        family(unet(0, "vp").get_model_object("model_sampling"))


@pytest.mark.slow
def test_large_first_sigma_does_not_make_the_blend_depend_on_chain_order():
    """At the first σ of a model with zero terminal SNR, 4519, scores differ by 1e-5."""
    models = [unet(seed, "v", zsnr=True) for seed in range(3)]
    prompts = [PROMPTS, EXPERT_PROMPTS, (conditioning(50), conditioning(51))]
    record, calls, pairs = run(models, prompts, latent(2, 64, 48), [{}, {}], steps=2)
    assert calls[0].sigma[0] > 4000
    for i, call in enumerate(calls):
        check_step(record, i, call, definition(call, pairs[i], strengths=[1] * 3, guidance=[CFG] * 3))
    orders = []
    for order in ((1, 2), (2, 1)):
        model = models[0]
        for k in order:
            model, _ = blend(model, models[k], *prompts[k])
        orders.append(ksample(model, *PROMPTS, latent(2, 64, 48), steps=2))
    assert torch.equal(*orders)


@pytest.mark.parametrize("pixart_is", ["base", "expert"])
def test_pixart_on_a_small_latent_is_refused_by_name(pixart_is):
    """PixArt divides the positions of its embedding by round(side of the latent / 64), which is 0 below 264 pixels."""
    small, large = (latent(1, side, side) for side in (16, 40))
    models = [pixart(1), unet(0)] if pixart_is == "base" else [unet(0), pixart(1)]
    model, _ = blend(*models, *EXPERT_PROMPTS, label="the expert")
    with pytest.raises(ValueError, match=f"{pixart_is}.* divides by zero on a latent of this size"):
        ksample(model, *PROMPTS, small)
    assert ksample(model, *PROMPTS, large, steps=1).isfinite().all()


def test_zero_terminal_snr_base_is_blended_with_an_ordinary_expert(models):
    """The highest σ is 4519 for the base, 14.6 for the expert. The expert gets x unchanged, and its nearest σ."""
    with torch.inference_mode():
        base = ModelSamplingDiscrete().patch(models["v"][0], "v_prediction", True)[0]
    model, trace = blend(base, models["eps"][1], *EXPERT_PROMPTS)
    samples = ksample(model, *PROMPTS, latent(1, 12, 10))
    assert torch.isfinite(samples).all()
    assert trace.record.steps[0].sigma > 4000
    assert 0.01 < trace.record.mean_shares()[1].mean() < 0.99


def test_blend_of_two_flux_models_matches_the_definition():
    """The models have 16 channels, patches of 2x2 and distilled guidance."""
    base, expert = flux(0), flux(1)
    prompts = [tuple(conditioning(i + j, guidance=3.5) for j in (0, 1)) for i in (10, 30)]
    samples = latent(2, 12, 10, channels=16)
    model, trace = blend(base, expert, *prompts[1])
    model, calls = recording(model)
    ksample(model, *prompts[0], samples, cfg=3.0, scheduler="simple")
    alone = [predictions(m, *w, calls) for m, w in zip((base, expert), prompts, strict=True)]
    for i, call in enumerate(calls):
        pairs = [(a[i].cond, a[i].uncond) for a in alone]
        check_step(trace.record, i, call, definition(call, pairs, strengths=[1, 1], guidance=[3.0, 3.0]))


def test_image_to_image_model_rejected(models):
    with pytest.raises(ValueError, match="image-to-image"):
        blend(models["eps"][0], unet(1, "img_to_img"))
