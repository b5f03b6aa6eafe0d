"""Bad input gets an error that names the value and the remedy, or the documented behaviour."""

import comfy.latent_formats
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from comfy_extras.nodes_context_windows import ContextWindowsManualNode

from chorus.dev.tools.client import WorkflowError
from chorus.tests.support.tiny_models import blend, conditioning, in_inference_mode, ksample, latent, unet, view

WORDS, EXPERT_WORDS = [(conditioning(i), conditioning(i + 1)) for i in (10, 30)]


@pytest.fixture(scope="module")
def models():
    return unet(0), unet(1)


def sample(model, samples=None, **sampling):
    return ksample(model, *WORDS, samples or latent(2, 12, 10), **{"steps": 2, **sampling})


@pytest.mark.parametrize("latent_format", [comfy.latent_formats.SD3, comfy.latent_formats.SDXL])
def test_expert_of_another_latent_space_names_both_formats(models, latent_format):
    theirs = latent_format()
    described = rf"'odd'.*{latent_format.__name__} \({theirs.latent_channels} channels.*SD15 \(4 channels"
    with pytest.raises(ValueError, match=described):
        blend(models[0], unet(1, latent_format=latent_format), label="odd")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("saliency", ["own", "shared"])
@pytest.mark.parametrize("side", ["base", "expert"])
def test_a_prediction_that_is_not_finite_names_the_model(models, side, saliency, value):
    broken = unet(5)
    with torch.inference_mode():
        broken.model.diffusion_model.out[-1].bias[1] = value
    base, expert = (broken, models[1]) if side == "base" else (models[0], broken)
    model, trace = blend(base, expert, *EXPERT_WORDS, label="painter", saliency=saliency)
    name = "base" if side == "base" else "painter"
    with pytest.raises(ValueError, match=rf"'{name}' is not finite .* at sigma 14\.61"):
        sample(model)
    assert trace.record is None


@pytest.mark.parametrize("saliency", ["own", "shared"])
@pytest.mark.parametrize("which", ["positive", "negative"])
def test_a_conditioning_that_is_not_finite_names_the_model(models, which, saliency):
    poisoned = [[torch.full_like(EXPERT_WORDS[0][0][0], float("nan")), EXPERT_WORDS[0][0][1]]]
    words = {"positive": EXPERT_WORDS[0], "negative": EXPERT_WORDS[1], which: poisoned}
    with pytest.raises(ValueError, match="'painter' is not finite"):
        sample(blend(*models, **words, label="painter", saliency=saliency)[0])


@pytest.mark.parametrize("mode", ["compete", "force"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_region_of_another_batch_count_repeats_as_the_host_repeats_masks(models, mode, count):
    """Too few masks start over, too many are not looked at."""
    region = torch.rand(count, 12, 10, generator=torch.Generator().manual_seed(0))
    fitting = torch.cat([region] * 3)[:3]
    got, wanted = (
        sample(blend(*models, *EXPERT_WORDS, region=r, region_mode=mode)[0], latent(3, 12, 10))
        for r in (region, fitting)
    )
    assert torch.equal(got, wanted)


def test_region_without_a_batch_axis(models):
    region = torch.rand(12, 10, generator=torch.Generator().manual_seed(0))
    got, wanted = (sample(blend(*models, *EXPERT_WORDS, region=r)[0]) for r in (region, region[None]))
    assert torch.equal(got, wanted)


def test_region_beyond_0_to_1_is_clipped(models):
    region = torch.rand(1, 12, 10, generator=torch.Generator().manual_seed(0)) * 3 - 1
    got, wanted = (sample(blend(*models, *EXPERT_WORDS, region=r)[0]) for r in (region, region.clamp(0, 1)))
    assert torch.equal(got, wanted)


def test_region_that_is_not_finite_is_refused(models):
    with pytest.raises(ValueError, match=r"region of 'painter'.*not finite"):
        sample(blend(*models, *EXPERT_WORDS, region=torch.full((1, 12, 10), float("nan")), label="painter")[0])


@in_inference_mode
def sample_guider(guider, sigmas):
    noise, euler = custom.Noise_RandomNoise(1), comfy.samplers.sampler_object("euler")
    return custom.SamplerCustomAdvanced.execute(noise, guider, euler, sigmas, latent(1, 12, 10)).args[0]["samples"]


@pytest.mark.parametrize("sigmas", [[], [5.0]], ids=["none", "one"])
def test_no_steps_is_what_the_host_makes_of_it(models, sigmas):
    model, trace = blend(*models, *EXPERT_WORDS)
    sigmas = torch.tensor(sigmas)
    got, wanted = (sample_guider(custom.CFGGuider.execute(m, *WORDS, 5.0).args[0], sigmas) for m in (model, models[0]))
    assert torch.equal(got, wanted)
    with pytest.raises(ValueError, match="no finished run"):
        view(trace, {"samples": got})


def test_no_steps_after_a_run_shows_no_stale_run_as_this_one(models):
    model, trace = blend(*models, *EXPERT_WORDS)
    sample(model)
    got = sample_guider(custom.CFGGuider.execute(model, *WORDS, 5.0).args[0], torch.tensor([]))
    assert "not from the run shown here" in view(trace, {"samples": got})[2]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(expert_cfg=3.0), "expert_cfg 3 of 'painter'.*single cfg.*CFGGuider"),
        (dict(saliency="shared"), "saliency 'shared'.*no single.*'own'"),
    ],
    ids=["expert_cfg", "shared"],
)
def test_a_guider_of_several_scales(models, inputs, message):
    model = blend(*models, *EXPERT_WORDS, label="painter", **inputs)[0]
    guider = custom.DualCFGGuider.execute(model, WORDS[0], conditioning(50), WORDS[1], 3.0, 2.0, "regular").args[0]
    with pytest.raises(ValueError, match=message):
        sample_guider(guider, torch.tensor([5.0, 1.0, 0.0]))


def test_expert_cfg_beside_cfg_0(models):
    with pytest.raises(ValueError, match=r"expert_cfg 3 of 'painter'.*cfg 0"):
        sample(blend(*models, *EXPERT_WORDS, expert_cfg=3.0, label="painter")[0], cfg=0.0)


def test_context_windows_are_refused(models):
    model = blend(*models, *EXPERT_WORDS)[0]
    with torch.inference_mode():
        model = ContextWindowsManualNode.execute(
            model, 6, 2, "standard_static", 1, False, "pyramid", 2, False, "", False, "", False
        ).args[0]
    with pytest.raises(ValueError, match="context windows"):
        sample(model)


def test_a_latent_that_is_no_picture_is_refused(models):
    model = blend(*models, *EXPERT_WORDS)[0]
    with pytest.raises(ValueError, match="3 axes"):
        sample(model, {"samples": torch.zeros(1, 4, 120)})


def test_a_failed_run_leaves_the_models_as_they_were(models):
    before = [sample(m) for m in models]
    narrow = [[torch.zeros(1, 5, 7), {}]]
    with pytest.raises(ValueError, match="cannot read what it was given"):
        sample(blend(*models, narrow, narrow)[0])
    assert all(m.model.current_patcher is None for m in models)
    assert all(torch.equal(sample(m), b) for m, b in zip(models, before, strict=True))


def test_a_missing_expert_is_refused_by_the_host(comfy):
    prompt = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "none.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "SaliencyNoiseBlend", "inputs": {"model": ["1", 0]}},
        "3": {"class_type": "SaliencyBlendView", "inputs": {"trace": ["2", 1]}},
    }
    with pytest.raises(WorkflowError, match=r"SaliencyNoiseBlend.*expert|expert.*SaliencyNoiseBlend"):
        comfy.run(prompt)
