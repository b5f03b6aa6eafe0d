"""Invalid inputs raise errors with the value and a remedy, or have the documented effect."""

import comfy.latent_formats
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from comfy_extras.nodes_context_windows import ContextWindowsManualNode

from chorus.dev.tools.client import WorkflowError
from chorus.tests.support.tiny_models import blend, conditioning, in_inference_mode, ksample, latent, unet, view

PROMPTS, EXPERT_PROMPTS = [(conditioning(i), conditioning(i + 1)) for i in (10, 30)]


@pytest.fixture(scope="module")
def models():
    return unet(0), unet(1)


def sample(model, samples=None, **sampling):
    return ksample(model, *PROMPTS, samples or latent(2, 12, 10), **{"steps": 2, **sampling})


@pytest.mark.parametrize("latent_format", [comfy.latent_formats.SD3, comfy.latent_formats.SDXL])
def test_latent_space_mismatch_error_names_both_formats(models, latent_format):
    theirs = latent_format()
    described = rf"'odd'.*{latent_format.__name__} \({theirs.latent_channels} channels.*SD15 \(4 channels"
    with pytest.raises(ValueError, match=described):
        blend(models[0], unet(1, latent_format=latent_format), label="odd")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("saliency", ["own", "shared"])
@pytest.mark.parametrize("side", ["base", "expert"])
def test_non_finite_prediction_error_names_the_model(models, side, saliency, value):
    broken = unet(5)
    with torch.inference_mode():
        broken.model.diffusion_model.out[-1].bias[1] = value
    base, expert = (broken, models[1]) if side == "base" else (models[0], broken)
    model, trace = blend(base, expert, *EXPERT_PROMPTS, label="expert", saliency=saliency)
    name = "base" if side == "base" else "expert"
    with pytest.raises(ValueError, match=rf"'{name}' is not finite .* at sigma 14\.61"):
        sample(model)
    assert trace.record is None


@pytest.mark.parametrize("saliency", ["own", "shared"])
@pytest.mark.parametrize("which", ["positive", "negative"])
def test_non_finite_conditioning_error_names_the_model(models, which, saliency):
    non_finite = [[torch.full_like(EXPERT_PROMPTS[0][0][0], float("nan")), EXPERT_PROMPTS[0][0][1]]]
    prompts = {"positive": EXPERT_PROMPTS[0], "negative": EXPERT_PROMPTS[1], which: non_finite}
    with pytest.raises(ValueError, match="'expert' is not finite"):
        sample(blend(*models, **prompts, label="expert", saliency=saliency)[0])


@pytest.mark.parametrize("mode", ["compete", "force"])
def test_region_of_another_number_of_masks_rejected(models, mode):
    region = torch.rand(4, 12, 10, generator=torch.Generator().manual_seed(0))
    for count in (2, 4):
        blended = blend(*models, *EXPERT_PROMPTS, region=region[:count], region_mode=mode, label="cats")[0]
        with pytest.raises(ValueError, match=rf"expected 1 mask .* 3 masks .* the region of 'cats', got {count} masks"):
            sample(blended, latent(3, 12, 10))


def test_region_without_a_batch_axis_accepted(models):
    region = torch.rand(12, 10, generator=torch.Generator().manual_seed(0))
    got, expected = (sample(blend(*models, *EXPERT_PROMPTS, region=r)[0]) for r in (region, region[None]))
    assert torch.equal(got, expected)


def test_region_beyond_0_to_1_clipped(models):
    region = torch.rand(1, 12, 10, generator=torch.Generator().manual_seed(0)) * 3 - 1
    got, expected = (sample(blend(*models, *EXPERT_PROMPTS, region=r)[0]) for r in (region, region.clamp(0, 1)))
    assert torch.equal(got, expected)


def test_non_finite_region_rejected(models):
    with pytest.raises(ValueError, match=r"region of 'expert'.*not finite"):
        sample(blend(*models, *EXPERT_PROMPTS, region=torch.full((1, 12, 10), float("nan")), label="expert")[0])


@in_inference_mode
def sample_guider(guider, sigmas):
    noise, euler = custom.Noise_RandomNoise(1), comfy.samplers.sampler_object("euler")
    return custom.SamplerCustomAdvanced.execute(noise, guider, euler, sigmas, latent(1, 12, 10)).args[0]["samples"]


@pytest.mark.parametrize("sigmas", [[], [5.0]], ids=["no sigma", "one sigma"])
def test_schedule_without_steps_gives_the_same_bits_as_without_the_blend(models, sigmas):
    model, trace = blend(*models, *EXPERT_PROMPTS)
    sigmas = torch.tensor(sigmas)
    got, expected = (
        sample_guider(custom.CFGGuider.execute(m, *PROMPTS, 5.0).args[0], sigmas) for m in (model, models[0])
    )
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="no finished run"):
        view(trace, {"samples": got})


def test_view_marks_an_older_run_after_a_schedule_without_steps(models):
    model, trace = blend(*models, *EXPERT_PROMPTS)
    sample(model)
    got = sample_guider(custom.CFGGuider.execute(model, *PROMPTS, 5.0).args[0], torch.tensor([]))
    assert "not from the run shown here" in view(trace, {"samples": got})[2]


def test_view_names_a_sampler_that_uses_another_model(models):
    model, trace = blend(*models, *EXPERT_PROMPTS)
    sample(model)
    found = view(trace, {"samples": sample(models[0])})[2].splitlines()[0]
    assert "uses another model than the blend; connect the MODEL of Saliency Noise Blend to the sampler" in found


@pytest.mark.parametrize("shape", [(2, 4, 12, 10), (2, 4, 3, 12, 10)], ids=["images", "video"])
def test_view_without_a_trace_shows_why(shape):
    image, mask, report = view(None, {"samples": torch.zeros(shape)})
    assert image.shape[0] == 2 and len(image.unique()) > 10
    assert torch.equal(mask, torch.zeros(2 * (3 if len(shape) == 5 else 1), 12, 10))
    assert "bypassed" in report


def test_view_without_samples_is_refused():
    with pytest.raises(ValueError, match="samples is not connected; connect the sampler's latent"):
        view(None, None)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(expert_cfg=3.0), "expert_cfg 3 of 'expert'.*single cfg.*CFGGuider"),
        (dict(saliency="shared"), "saliency 'shared'.*single cfg.*'own'"),
    ],
    ids=["expert_cfg", "shared"],
)
def test_guider_with_several_cfg_scales_rejected(models, inputs, message):
    model = blend(*models, *EXPERT_PROMPTS, label="expert", **inputs)[0]
    guider = custom.DualCFGGuider.execute(model, PROMPTS[0], conditioning(50), PROMPTS[1], 3.0, 2.0, "regular").args[0]
    with pytest.raises(ValueError, match=message):
        sample_guider(guider, torch.tensor([5.0, 1.0, 0.0]))


def test_expert_cfg_with_cfg_0_rejected(models):
    with pytest.raises(ValueError, match=r"expert_cfg 3 of 'expert'.*cfg 0"):
        sample(blend(*models, *EXPERT_PROMPTS, expert_cfg=3.0, label="expert")[0], cfg=0.0)


def test_context_windows_rejected(models):
    model = blend(*models, *EXPERT_PROMPTS)[0]
    with torch.inference_mode():
        model = ContextWindowsManualNode.execute(
            model, 6, 2, "standard_static", 1, False, "pyramid", 2, False, "", False, "", False
        ).args[0]
    with pytest.raises(ValueError, match="context windows"):
        sample(model)


@pytest.mark.parametrize(
    "size, message",
    [
        ((1, 4, 120), "expected a latent with 4 channels and at least 4 axes for the models of the blend, got 1x4x120"),
        ((1, 4, 2, 2, 6, 5), r"images \[B, C, H, W\], video \[B, C, T, H, W\] or audio \[B, C, L\], got 1x4x2x2x6x5;"),
    ],
    ids=["audio for an image model", "6 axes"],
)
def test_latent_of_other_axes_rejected(models, size, message):
    model = blend(*models, *EXPERT_PROMPTS)[0]
    with pytest.raises(ValueError, match=message):
        sample(model, {"samples": torch.zeros(size)})


def test_failed_run_leaves_the_models_unchanged(models):
    before = [sample(m) for m in models]
    narrow = [[torch.zeros(1, 5, 7), {}]]
    with pytest.raises(ValueError, match="inputs do not fit the layers"):
        sample(blend(*models, narrow, narrow)[0])
    assert all(m.model.current_patcher is None for m in models)
    assert all(torch.equal(sample(m), b) for m, b in zip(models, before, strict=True))


def test_missing_expert_rejected_by_comfyui(client):
    prompt = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "none.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "SaliencyNoiseBlend", "inputs": {"model": ["1", 0]}},
        "3": {"class_type": "SaliencyBlendView", "inputs": {"trace": ["2", 1]}},
    }
    with pytest.raises(WorkflowError, match=r"SaliencyNoiseBlend.*expert|expert.*SaliencyNoiseBlend"):
        client.run(prompt)


def test_report_and_log_name_the_same_checkpoint_without_a_prompt_of_its_own(models, caplog):
    blended, trace = blend(models[0], models[0])
    samples = sample(blended)
    report = view(trace, {"samples": samples})[2]
    expected = "base and 'expert 1' predicted the same in all steps; connect another checkpoint to expert"
    assert report.startswith(expected)
    [record] = [r for r in caplog.records if r.levelname == "WARNING"]
    assert record.getMessage().startswith(expected)
    blended, trace = blend(models[0], models[0], *EXPERT_PROMPTS)
    sample(blended)
    assert len(caplog.records) == 1
    assert "predicted the same" not in trace.record.report()


def test_report_names_an_expert_whose_prompt_is_its_negative_prompt(models):
    blended, trace = blend(*models, EXPERT_PROMPTS[0], EXPERT_PROMPTS[0])
    sample(blended)
    assert "the prompt changes no prediction of 'expert 1' (saliency 0 everywhere)" in trace.record.report()


@pytest.mark.parametrize("mode", ["compete", "force"])
def test_empty_region_is_reported_by_sample(models, mode):
    region = torch.ones(3, 12, 10)
    region[0] = region[2] = 0.0
    region[1, 0, 0] = 0.9
    blended, trace = blend(*models, *EXPERT_PROMPTS, region=region, region_mode=mode, label="cats")
    sample(blended, latent(3, 12, 10))
    report = trace.record.report()
    limit = "below 0.5" if mode == "force" else "0"
    assert (
        f"the region of 'cats' is {limit} everywhere in samples 1 and 3, so that it generates nothing there" in report
    )
    assert "Load Image" not in report
    shares = next(line for line in report.splitlines() if line.startswith("cats, over the whole run in each sample"))
    numbers = shares.split(": ")[1].split(", ")
    assert len(numbers) == 3 and numbers[0] == numbers[2] == "0.0 %" and numbers[1] != "0.0 %"


def test_empty_mask_of_load_image_as_region_is_reported(models):
    blended, trace = blend(*models, *EXPERT_PROMPTS, region=torch.zeros(1, 64, 64), label="cats")
    assert torch.equal(sample(blended), sample(models[0]))
    report = trace.record.report()
    assert (
        "the region of 'cats' is 0 everywhere, so that it generates nothing there; this looks like the empty 64x64 mask"
        in report
    )


def test_non_finite_prediction_error_names_the_sample(models):
    rows = torch.cat([EXPERT_PROMPTS[0][0][0]] * 3)
    rows[1] = float("nan")
    positive = [[rows, EXPERT_PROMPTS[0][0][1]]]
    with pytest.raises(ValueError, match=r"'cats' is not finite .* at sigma [0-9.]+ in sample 2;"):
        sample(blend(*models, positive, EXPERT_PROMPTS[1], label="cats")[0], latent(3))
