"""SeedSelect with sigmas, sampler and guider, as SamplerCustomAdvanced samples."""

import json

import comfy.samplers
import comfy_extras.nodes_align_your_steps as align_your_steps
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_flux as flux_nodes
import comfy_extras.nodes_perpneg as perpneg
import pytest
import torch
import torch.nn.functional as F

from chorus.nodes.seed_select import SeedSelect
from chorus.nodes.vary_prompt import VaryPrompt
from chorus.techniques.seed_select.comfy_inputs import KSamplerInputs
from chorus.techniques.seed_select.comfy_sampler import ComfySeedSampler
from chorus.tests.families.tiny_vae import tiny_vae
from chorus.tests.support.gradients import direction_of, finite_difference, gradient
from chorus.tests.support.heads import apply_head, head_for
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
    defaults,
    flux,
    forwards,
    in_inference_mode,
    latent,
    lora,
    unet,
)

pytestmark = pytest.mark.usefixtures("one_thread")
POSITIVE, NEGATIVE = conditioning(10), conditioning(11)
CFG = 3.0


@pytest.fixture(scope="module")
def model():
    return unet(0)


@pytest.fixture(scope="module")
def other():
    return unet(1)


def references():
    coarse = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    return F.interpolate(coarse, (64, 64), mode="bilinear").movedim(1, -1).contiguous()


@in_inference_mode
def select(model, **inputs):
    wired = dict(model=model, positive=POSITIVE, negative=NEGATIVE, latent_image=latent(), vae=tiny_vae(4))
    few = dict(candidates=4, first_steps=1, semantic_weight=0.0, cfg=CFG, iterations=2, learning_rate=0.5)
    wired |= dict(references=references())
    return SeedSelect.execute(**{**defaults(SeedSelect), **wired, **few, **inputs}).args


@in_inference_mode
def sampled(noise, guider, sigmas, sampler=None, samples=None):
    """Samples of SamplerCustomAdvanced."""
    sampler = sampler or custom.KSamplerSelect.execute("euler").args[0]
    out = custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, samples or latent())
    return out.args[0]["samples"]


@in_inference_mode
def cfg_guider(model):
    return custom.CFGGuider.execute(model, POSITIVE, NEGATIVE, CFG).args[0]


@in_inference_mode
def two_model_guider(model, other):
    return custom.DualModelGuider.execute(model, POSITIVE, CFG, other, NEGATIVE).args[0]


GUIDERS = {
    "CFGGuider": lambda model, other: cfg_guider(model),
    "DualModelGuider": two_model_guider,
    "BasicGuider": lambda model, other: custom.BasicGuider.execute(model, POSITIVE).args[0],
    "DualCFGGuider": lambda model, other: custom.DualCFGGuider.execute(
        model, POSITIVE, conditioning(12), NEGATIVE, 2.0, 1.5, "regular"
    ).args[0],
    "PerpNegGuider": lambda model, other: perpneg.PerpNegGuider.execute(
        model, POSITIVE, NEGATIVE, conditioning(13), CFG, 1.0
    ).args[0],
}
SIGMAS = {
    "BasicScheduler": lambda model: custom.BasicScheduler.execute(model, "karras", 4, 1.0).args[0],
    "AlignYourSteps": lambda model: align_your_steps.AlignYourStepsScheduler.execute("SD1", 5, 1.0).args[0],
    "Flux2Scheduler": lambda model: flux_nodes.Flux2Scheduler.execute(4, 1024, 1024).args[0],
    "low sigmas of SplitSigmas": lambda model: custom.SplitSigmas.execute(
        custom.BasicScheduler.execute(model, "normal", 6, 1.0).args[0], 2
    ).args[1],
    "ManualSigmas": lambda model: custom.ManualSigmas.execute("14.6, 5.0, 2.0, 2.0, 0.5, 0.0").args[0],
}


def sigmas_of(name, model):
    with torch.inference_mode():
        return SIGMAS[name](model)


def random_noise(seed):
    return custom.RandomNoise.execute(seed).args[0]


@pytest.mark.parametrize("guider", ["CFGGuider", "DualModelGuider"])
@pytest.mark.parametrize("sigmas", SIGMAS)
def test_noise_and_seed_give_the_same_bits_in_sampler_custom_advanced(sigmas, guider, model, other):
    guider, sigmas = GUIDERS[guider](model, other), sigmas_of(sigmas, model)
    noise, seed, samples, _, _, report = select(model, guider=guider, sigmas=sigmas)
    for used in (noise, random_noise(seed)):
        assert torch.equal(samples["samples"], sampled(used, guider, sigmas))
    assert "guider connected: model, positive, negative and cfg not used" in report
    assert "sigmas connected: steps, scheduler and denoise not used" in report


EVERY_GUIDER = [pytest.param(name, marks=[] if name == "CFGGuider" else pytest.mark.slow) for name in GUIDERS]


@pytest.mark.parametrize("guider", EVERY_GUIDER)
def test_optimized_noise_gives_the_same_bits_with_every_guider(guider, model, other):
    guider, sigmas = GUIDERS[guider](model, other), sigmas_of("BasicScheduler", model)
    noise, _, samples, *_ = select(model, guider=guider, sigmas=sigmas, mode="search+optimize")
    assert "optimised" in noise.details["found"]
    assert torch.equal(samples["samples"], sampled(noise, guider, sigmas))


@pytest.mark.parametrize("guider", EVERY_GUIDER)
def test_gradient_equals_finite_differences_with_every_guider(guider, model, other):
    run = ComfySeedSampler(inputs_with(model, steps=3, guider=GUIDERS[guider](model, other)))
    _, found = gradient(run)
    direction = direction_of(found)
    expected = finite_difference(run, direction, step=1e-2)
    assert float((found * direction).sum()) == pytest.approx(expected, abs=2e-3 * float(found.norm()))


def sampler_nodes():
    yield "KSamplerSelect", custom.KSamplerSelect.execute("dpmpp_2m").args[0]
    yield "ancestral", custom.SamplerEulerAncestral.execute(0.7, 1.1).args[0]
    yield "sde", custom.SamplerDPMPP_2M_SDE.execute("midpoint", 1.0, 1.0, "cpu").args[0]
    yield "ddim", custom.KSamplerSelect.execute("ddim").args[0]
    yield "dpm_fast", custom.KSamplerSelect.execute("dpm_fast").args[0]


@pytest.mark.parametrize("name", [name for name, _ in sampler_nodes()])
def test_connected_sampler_gives_the_same_bits(name, model):
    sampler = dict(sampler_nodes())[name]
    guider = cfg_guider(model)
    noise, seed, samples, _, _, report = select(model, sampler=sampler, steps=4, scheduler="simple")
    with torch.inference_mode():
        sigmas = custom.BasicScheduler.execute(model, "simple", 4, 1.0).args[0]
    for used in (noise, random_noise(seed)):
        assert torch.equal(samples["samples"], sampled(used, guider, sigmas, sampler))
    assert "sampler connected: sampler_name not used" in report


def inputs_with(model, steps=4, **custom_inputs):
    return KSamplerInputs(
        model=model,
        positive=POSITIVE,
        negative=NEGATIVE,
        latent_image=latent(),
        steps=steps,
        cfg=CFG,
        sampler_name="euler",
        scheduler="normal",
        **custom_inputs,
    )


def test_every_sampler_of_ksampler_is_recognised(model):
    unnamed = {"dpm_fast", "dpm_adaptive"}  # ComfyUI makes a new function each time
    for name in comfy.samplers.SAMPLER_NAMES:
        inputs = inputs_with(model, sampler=comfy.samplers.sampler_object(name))
        assert inputs.plain_sampler == (None if name in unnamed else name)
    with_options = custom.SamplerEulerAncestral.execute(0.7, 1.0).args[0]
    inputs = inputs_with(model, sampler=with_options)
    assert (inputs.base_sampler, inputs.plain_sampler) == ("euler_ancestral", None)


def test_candidates_are_batched_only_with_guiders_that_do_not_mix_them(model, other):
    sizes = {}
    for name, make in GUIDERS.items():
        run = ComfySeedSampler(inputs_with(model, guider=make(model, other)))
        sizes[name] = run.batch_size(4)
    assert sizes == {"CFGGuider": 4, "BasicGuider": 4, "DualModelGuider": 1, "DualCFGGuider": 1, "PerpNegGuider": 1}


def test_short_runs_take_the_connected_sigmas(model):
    sigmas = sigmas_of("BasicScheduler", model)
    run = ComfySeedSampler(inputs_with(model, sigmas=sigmas))
    assert torch.equal(run.sigmas(2), sigmas[[0, 2, 4]])
    more = run.sigmas(8)
    assert torch.equal(more[::2], sigmas) and bool((more[1:] < more[:-1]).all())


@in_inference_mode
def blended(model, other):
    return blend(model, other, *(conditioning(20), conditioning(21)), expert_strength=2.0)[0]


PATCHED = {
    "blend": blended,
    "head": lambda model, other: apply_head(model, head_for(model, size=0.5, cfg=CFG)),
    "lora": lambda model, other: lora(model, seed=3),
}


@pytest.mark.parametrize("patch", PATCHED)
@pytest.mark.parametrize("guider", ["CFGGuider", "DualModelGuider"])
def test_what_the_guiders_model_carries_takes_part(guider, patch, model, other):
    guider = GUIDERS[guider](PATCHED[patch](model, other), other)
    sigmas = sigmas_of("BasicScheduler", model)
    noise, _, samples, *_ = select(model, guider=guider, sigmas=sigmas)
    found = samples["samples"]
    assert torch.equal(found, sampled(noise, guider, sigmas))
    plain = GUIDERS["CFGGuider"](model, other)
    assert not torch.equal(found, sampled(noise, plain, sigmas))


def test_model_prompts_and_cfg_are_not_used_with_a_guider(model, other):
    guider, sigmas = cfg_guider(model), sigmas_of("BasicScheduler", model)
    expected = select(model, guider=guider, sigmas=sigmas)[2]["samples"]
    unused = dict(positive=conditioning(30), negative=conditioning(31), cfg=9.0, steps=7, scheduler="beta", denoise=0.3)
    with forwards(other) as rows:
        found = select(other, guider=guider, sigmas=sigmas, **unused)[2]["samples"]
    assert torch.equal(found, expected) and not rows


@pytest.mark.parametrize("guider", ["CFGGuider", "BasicGuider"])
@pytest.mark.parametrize("mode", ["search", pytest.param("search+optimize", marks=pytest.mark.slow)])
def test_varied_prompt_of_a_guider_is_repeated_by_vary_prompt(mode, guider, model, other, monkeypatch):
    given, sigmas = GUIDERS[guider](model, other), sigmas_of("BasicScheduler", model)
    inputs = dict(guider=given, sigmas=sigmas, mode=mode)
    plain = select(model, **inputs)[2]["samples"]
    noise, seed, samples, _, _, report = select(model, **inputs, prompt_variation=0.8)
    assert f"Vary Prompt with seed {seed}, strength 0.8, end_percent 0.3" in report
    assert torch.equal(plain, select(model, **inputs)[2]["samples"])  # the connected guider is unchanged
    with torch.inference_mode():
        varied = VaryPrompt.execute(POSITIVE, seed, 0.8, 0.3).args[0]
    monkeypatch.setitem(globals(), "POSITIVE", varied)
    repeated = GUIDERS[guider](model, other)
    assert torch.equal(samples["samples"], sampled(noise, repeated, sigmas))
    assert not torch.equal(samples["samples"], sampled(noise, given, sigmas))


def test_details_name_the_connected_inputs(model):
    sigmas = sigmas_of("BasicScheduler", model)
    sampler = custom.KSamplerSelect.execute("heun").args[0]
    noise = select(model, guider=cfg_guider(model), sigmas=sigmas, sampler=sampler)[0]
    sampling = json.loads(noise.details["sampling"])
    assert sampling["sampler"] == "heun" and sampling["guider"] == "CFGGuider"
    assert sampling["sigmas"] == pytest.approx(sigmas.tolist())
    assert json.loads(noise.details["settings"])["steps"] == len(sigmas) - 1


class WithoutModel:
    def sample(self):
        raise AssertionError


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(sigmas=torch.tensor([0.0, 2.0, 14.0])), r"the sigmas \[0.0, 2.0, 14.0\] do not fall.*not flipped"),
        (dict(sigmas=torch.tensor([5.0, 5.0])), r"\[5.0, 5.0\] do not fall"),
        (dict(sigmas=torch.tensor([14.0, 5.0])), "do not end at 0.*low sigmas of SplitSigmas"),
        (dict(sigmas=torch.tensor([14.0, float("nan"), 0.0])), "not all finite"),
        (dict(sigmas=torch.FloatTensor([])), "expected at least two sigmas"),
        (dict(sigmas=torch.zeros(2, 2)), "expected at least two sigmas in one row, got the size 2x2"),
        (dict(sampler=object()), "expected a SAMPLER for sampler, got object; connect KSamplerSelect"),
        (dict(guider=WithoutModel()), "expected a GUIDER with a model for guider, got WithoutModel without one"),
        (
            dict(mode="optimize", sampler=custom.SamplerEulerAncestral.execute(0.7, 1.0).args[0]),
            "the sampler connected to sampler has no gradient; use one of euler, ddim, dpmpp_2m without options",
        ),
    ],
    ids="rising level high nan empty shape sampler guider optimize".split(),
)
def test_invalid_inputs_rejected_before_the_search(inputs, message, model):
    with forwards(model) as rows, pytest.raises(ValueError, match=message):
        select(model, **inputs)
    assert not rows


def test_guider_of_another_latent_space_rejected(model):
    guider = cfg_guider(flux(0))
    with pytest.raises(
        ValueError, match=r"the guider's model is .* channels.*, that of the model connected to model is .* connect the"
    ):
        select(model, guider=guider)
