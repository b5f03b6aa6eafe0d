"""Experts of another parametrisation see the same picture at the same ratio of noise to signal."""

import comfy.samplers
import numpy as np
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

from chorus.tests.support.blend_definition import CFG, FLOAT32, definition
from chorus.tests.support.host_definition import check_step
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
    flux,
    forwards,
    in_inference_mode,
    ksample,
    latent,
    predictions,
    recording,
    unet,
)

WORDS, EXPERT_WORDS = [(conditioning(i), conditioning(i + 1)) for i in (10, 30)]
EVERYWHERE = dict(region=torch.ones(1, 8, 8), region_mode="force")
VE = {"eps", "v"}  # x = x0 + σ n; flow: x = (1 - σ) x0 + σ n


@pytest.fixture(scope="module")
def models():
    return {kind: (unet(0, kind), unet(1, kind)) for kind in ("eps", "v", "flow")}


def same_picture(x, sigma, source, target, sigma_max):
    """(x, σ) for the target's kind in float64, amplitudes (signal, noise) written out."""
    x, sigma = x.double(), sigma.double().reshape(-1, 1, 1, 1)
    if (source in VE) == (target in VE):
        return x, sigma.flatten()
    if target == "flow":
        return x / (1 + sigma), (sigma / (1 + sigma)).flatten()
    ratio = sigma / (1 - sigma)
    # beyond the target's range: its highest noise, and x at the amplitude that it knows there
    beyond = ratio > sigma_max
    at_end = x * ((1 + sigma_max**2) / ((1 - sigma) ** 2 + sigma**2)).sqrt()
    return torch.where(beyond, at_end, x / (1 - sigma)), ratio.clamp(max=sigma_max).flatten()


@in_inference_mode
def listening(model):
    """A clone of ``model`` and the list of every (x, σ) that its network is asked at."""
    heard, out = [], model.clone()

    def wrapper(apply, params):
        heard.append((params["input"].clone(), params["timestep"].clone()))
        return apply(params["input"], params["timestep"], **params["c"])

    out.set_model_unet_function_wrapper(wrapper)
    return out, heard


@in_inference_mode
def sample(model, sigmas, words=WORDS):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*words)
    guider.set_cfg(CFG)
    noise = torch.randn(2, 4, 12, 10, generator=torch.Generator().manual_seed(1))
    return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, seed=1)


SIGMAS = {
    "eps": [14.6, 3.0, 0.5, 0.05, 0.0],
    "v": [14.6, 3.0, 0.5, 0.05, 0.0],
    "flow": [1.0, 0.95, 0.7, 0.3, 0.04, 0.0],
}


@pytest.mark.parametrize("target", ["eps", "v", "flow"])
@pytest.mark.parametrize("source", ["eps", "v", "flow"])
def test_expert_is_asked_at_the_same_picture(models, source, target):
    base, expert = models[source][0], models[target][1]
    listener, heard = listening(expert)
    model, trace = blend(base, listener, *EXPERT_WORDS)
    model, calls = recording(model)
    sample(model, torch.tensor(SIGMAS[source]))
    assert len(heard) == len(calls) == len(SIGMAS[source]) - 1

    sigma_max = float(expert.get_model_object("model_sampling").sigma_max)
    asked = []
    for call, (x, sigma) in zip(calls, heard, strict=True):
        want_x, want_sigma = same_picture(call.x, call.sigma, source, target, sigma_max)
        rows = len(call.x)
        np.testing.assert_allclose(sigma[:rows].double(), want_sigma, rtol=4 * FLOAT32)
        np.testing.assert_allclose(x[:rows].double(), want_x, rtol=8 * FLOAT32, atol=0)
        assert torch.equal(x[:rows], x[rows:])  # the prompt and its negative
        asked.append((x[:rows], sigma[:rows]))

    answers = predictions(base, *WORDS, calls)
    at = iter(asked)
    expert_answers = predictions(expert, *EXPERT_WORDS, calls, mapping=lambda x, sigma: next(at))
    for i, call in enumerate(calls):
        # what is compared is in the base's units: |D(y) - D(∅)| / σ of the base
        pairs = [(a[i].cond, a[i].uncond) for a in (answers, expert_answers)]
        check_step(trace.record, i, call, definition(call, pairs, strengths=[1, 1], guidance=[CFG] * 2))


def test_expert_is_left_out_below_its_least_noise(models):
    """A flow base goes down to σ = 0.001; eps models know nothing under 0.029."""
    base, expert = models["flow"][0], models["eps"][1]
    model, trace = blend(base, expert, *EXPERT_WORDS, **EVERYWHERE)
    with forwards(expert) as rows:
        sample(model, torch.tensor([0.9, 0.5, 0.02, 0.01, 0.0]))
    assert [s.models for s in trace.record.steps] == [(0, 1), (0, 1), (0,), (0,)]
    assert len(rows) == 2


def test_percent_ranges_on_the_experts_prompt_are_in_its_own_sigmas(models):
    """Half of the sampling percent of an eps model is σ = 1.6; a flow base passes that between 0.7 and 0.5."""
    base, expert = models["flow"][0], models["eps"][1]
    positive = [
        *conditioning(50, start_percent=0.0, end_percent=0.5),
        *conditioning(51, start_percent=0.5, end_percent=1.0),
    ]
    model, calls = recording(blend(base, expert, positive, EXPERT_WORDS[1], **EVERYWHERE)[0])
    sample(model, torch.tensor([0.9, 0.7, 0.5, 0.0]))
    middle = expert.get_model_object("model_sampling").percent_to_sigma(0.5)
    for call in calls:
        x, sigma = (t.float() for t in same_picture(call.x, call.sigma, "flow", "eps", 14.6))
        prompt = positive[:1] if sigma[0] > middle else positive[1:]
        prompt = [[prompt[0][0], {"pooled_output": prompt[0][1]["pooled_output"]}]]
        (alone,) = predictions(expert, prompt, EXPERT_WORDS[1], [call], mapping=lambda *_, x=x, sigma=sigma: (x, sigma))
        torch.testing.assert_close(call.cond, alone.cond, rtol=1e-4, atol=1e-4)


def test_zero_terminal_snr_base_and_ordinary_expert(models):
    """σ up to 4519 beside 14.6: one family, so x goes as it is and the host reads σ as the nearest it knows."""
    with torch.inference_mode():
        base = ModelSamplingDiscrete().patch(models["v"][0], "v_prediction", True)[0]
    model, trace = blend(base, models["eps"][1], *EXPERT_WORDS)
    samples = ksample(model, *WORDS, latent(1, 12, 10))
    assert torch.isfinite(samples).all()
    assert trace.record.steps[0].sigma > 4000
    assert 0.01 < trace.record.mean_shares()[1].mean() < 0.99


def test_two_fluxes():
    """16 channels, patches of 2x2, distilled guidance."""
    base, expert = flux(0), flux(1)
    words = [tuple(conditioning(i + j, guidance=3.5) for j in (0, 1)) for i in (10, 30)]
    samples = latent(2, 12, 10, channels=16)
    model, trace = blend(base, expert, *words[1])
    model, calls = recording(model)
    ksample(model, *words[0], samples, cfg=3.0, scheduler="simple")
    asked = [predictions(m, *w, calls) for m, w in zip((base, expert), words, strict=True)]
    for i, call in enumerate(calls):
        pairs = [(a[i].cond, a[i].uncond) for a in asked]
        check_step(trace.record, i, call, definition(call, pairs, strengths=[1, 1], guidance=[3.0, 3.0]))


def test_an_image_to_image_model_is_refused(models):
    with pytest.raises(ValueError, match="image-to-image"):
        blend(models["eps"][0], unet(1, "img_to_img"))
