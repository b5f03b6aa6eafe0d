"""The blend with ComfyUI's sampler nodes, guiders, previews, and guidance methods that predict again within a step."""

import math

import comfy.model_management
import comfy.samplers
import comfy.utils
import comfy_extras.nodes_custom_sampler as custom
import nodes
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod, args

from chorus.tests.support.blend_definition import definition
from chorus.tests.support.host_definition import check_step, run
from chorus.tests.support.tiers import covering, quick
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
    forwards,
    in_inference_mode,
    ksample,
    latent,
    perturbed,
    predictions,
    recording,
    self_attention,
    unet,
)

PROMPTS, EXPERT_PROMPTS = [(conditioning(i), conditioning(i + 1)) for i in (10, 30)]
EVERYWHERE = dict(region=torch.ones(1, 8, 8), region_mode="force")
NOWHERE = dict(bias=-100.0)
CFG, STEPS = 5.0, 3


@pytest.fixture(scope="module")
def models():
    return unet(0), unet(1)


def sample(model, prompts=PROMPTS, **sampling):
    return ksample(model, *prompts, latent(2, 12, 10), **{"steps": STEPS, "cfg": CFG, **sampling})


def blended(models, **inputs):
    return blend(*models, *EXPERT_PROMPTS, **inputs)


def sigmas(model, steps=STEPS):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)


@in_inference_mode
def sample_custom(model):
    euler = comfy.samplers.sampler_object("euler")
    out = custom.SamplerCustom.execute(model, True, 1, CFG, *PROMPTS, euler, sigmas(model), latent(2, 12, 10))
    return out.args[0]["samples"]


@in_inference_mode
def sample_guider(guider, levels):
    noise, euler = custom.Noise_RandomNoise(1), comfy.samplers.sampler_object("euler")
    return custom.SamplerCustomAdvanced.execute(noise, guider, euler, levels, latent(2, 12, 10)).args[0]["samples"]


def sample_advanced_guider(model):
    return sample_guider(custom.CFGGuider.execute(model, *PROMPTS, CFG).args[0], sigmas(model))


@in_inference_mode
def sample_advanced(model, start=0, end=10000, leftover="disable", noise="enable", samples=None):
    node = nodes.KSamplerAdvanced()
    samples = {"samples": samples} if samples is not None else latent(2, 12, 10)
    return node.sample(model, noise, 1, STEPS, CFG, "euler", "normal", *PROMPTS, samples, start, end, leftover)[0][
        "samples"
    ]


@pytest.mark.parametrize("sample_with", [sample_custom, sample_advanced_guider, sample_advanced])
def test_every_sampler_node_returns_the_same_samples(models, sample_with):
    model, trace = blended(models)
    expected = sample(model)
    assert torch.equal(sample_with(model), expected)
    assert len(trace.record.steps) == STEPS
    assert trace.record.belongs_to(expected)
    assert 0.02 < trace.record.mean_shares()[1].mean() < 0.98


def test_run_in_two_halves_equals_one_run(models):
    """KSampler (Advanced) passes on the noisy latent. The expert's window covers the same sigmas in both cases."""
    model, trace = blended(models, end_percent=0.5)
    whole, steps = sample(model), trace.record.steps
    half = sample_advanced(model, end=2, leftover="enable")
    assert [s.sigma for s in trace.record.steps] == [s.sigma for s in steps[:2]]
    rest = sample_advanced(model, start=2, noise="disable", samples=half)
    assert [(s.sigma, s.models) for s in trace.record.steps] == [(s.sigma, s.models) for s in steps[2:]]
    # between the halves, ComfyUI undoes and repeats the scaling of the latent, which rounds
    torch.testing.assert_close(rest, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "sampler",
    quick(
        ["heun", "dpmpp_2s_ancestral", "lcm", "uni_pc_bh2"],
        [
            "euler",
            "heun",
            "dpm_2",
            "dpm_2_ancestral",
            "dpmpp_2s_ancestral",
            "lcm",
            "uni_pc_bh2",
            "res_multistep",
            "ddim",
        ],
    ),
)
def test_model_that_wins_everywhere_samples_as_without_a_blend_with_every_sampler(models, sampler):
    base, expert = models
    assert torch.equal(
        sample(blended(models, **EVERYWHERE)[0], sampler=sampler), sample(expert, EXPERT_PROMPTS, sampler=sampler)
    )
    assert torch.equal(sample(blended(models, **NOWHERE)[0], sampler=sampler), sample(base, sampler=sampler))


def extrapolate(known, sigma):
    """The offset at ``sigma``: the last offset plus half a first-order step in ln sigma.

    ``known``: (sigma, offset) of the evaluations so far. The step is at most the step between the last two evaluations.
    """
    if len(known) == 1:
        return known[0][1]
    (s0, o0), (s1, o1) = known[-2:]
    t = min(max(math.log(sigma / s1) / math.log(s1 / s0), 0.0), 1.0)
    return [b + 0.5 * t * (b - a) for a, b in zip(o0, o1, strict=True)]


@covering(refresh=[2, 3], sampler=["euler", "heun", "dpm_2"])
def test_refresh_evaluates_the_expert_once_per_interval(models, sampler, refresh):
    """At all other calls, the expert's offsets from the base's cond and uncond are extrapolated."""
    steps = 5  # enough for two evaluations before the end
    record, calls, pairs = run(
        models, [PROMPTS, EXPERT_PROMPTS], latent(2, 17, 23), [dict(refresh=refresh)], steps=steps, sampler=sampler
    )
    levels = comfy.samplers.KSampler(models[0], steps, models[0].load_device, sampler, "normal").sigmas
    group_of_last, known, extrapolated = None, [], 0
    for i, call in enumerate(calls):
        # sigmas fall, and interval 0 starts at the first sigma
        interval = int((levels >= call.sigma[0]).sum()) - 1
        base, now = pairs[i]
        sigma = float(call.sigma[0])
        if interval // refresh != group_of_last:
            group_of_last = interval // refresh
            known.append((sigma, [e - b for e, b in zip(now, base, strict=True)]))
        else:
            extrapolated += len(known) > 1 and sigma < known[-1][0]
            now = [b + o for b, o in zip(base, extrapolate(known, sigma), strict=True)]
        check_step(record, i, call, definition(call, [base, now], strengths=[1, 1], guidance=[CFG] * 2))
    assert extrapolated  # at least one offset is extrapolated from two evaluations
    assert record.spent == [len(calls), len(known)]
    assert record.saved == [0, len(calls) - len(known)]


def test_refresh_saves_forward_passes(models):
    model, _ = blended(models, refresh=2)
    with forwards(models[1]) as rows:
        sample(model, steps=5)
    assert len(rows) == 3


def test_previews_show_the_blend(models, monkeypatch):
    model, _ = blended(models)
    model, calls = recording(model)
    shown = []
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: shown.append(preview))
    sample(model)
    assert len(shown) == STEPS
    # ComfyUI shows x0 of the first sample, converted to RGB with the factors of the latent format
    latent_format = models[0].get_model_object("latent_format")
    factors, bias = torch.tensor(latent_format.latent_rgb_factors), latent_format.latent_rgb_factors_bias
    for (_, image, _), call in zip(shown, calls, strict=True):
        rgb = torch.einsum("chw,cr->hwr", call.denoised[0], factors) + (0.0 if bias is None else torch.tensor(bias))
        expected = ((rgb + 1) / 2).clamp(0, 1).mul(255).byte()
        got = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(expected.shape)
        assert (got.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("guide", [perturbed, self_attention])
@pytest.mark.parametrize("refresh", [1, 2])
def test_predicting_again_advances_neither_refresh_nor_trace(models, guide, refresh):
    """Perturbed-attention and self-attention guidance predict once more at the same sigma."""
    model, trace = blended(models, refresh=refresh)
    guided = guide(model)
    sample(guided, steps=4)
    assert len(trace.record.steps) == 4
    assert trace.record.spent == [4, 4 // refresh]


def test_perturbed_attention_adds_no_forward_pass_of_the_expert(models):
    guided = perturbed(blended(models)[0])
    with forwards(models[0]) as base_rows, forwards(models[1]) as expert_rows:
        sample(guided)
    assert len(base_rows) == 2 * STEPS
    assert len(expert_rows) == STEPS


@pytest.mark.parametrize("guide", [perturbed, self_attention])
def test_guidance_patch_acts_on_the_base(models, guide):
    plain = sample(models[0]), sample(guide(models[0]))
    assert not torch.equal(*plain)
    assert torch.equal(sample(guide(blended(models, **NOWHERE)[0])), plain[1])


def test_perturbed_attention_of_the_base_does_not_affect_the_expert(models):
    assert torch.equal(sample(perturbed(blended(models, **EVERYWHERE)[0])), sample(models[1], EXPERT_PROMPTS))


@covering(cfg2=[2.0, 1.0], style=["regular", "nested"])
def test_dual_cfg_blends_all_three_predictions(models, style, cfg2):
    middle = conditioning(50)

    def dual(model, prompts):
        with torch.inference_mode():
            guider = custom.DualCFGGuider.execute(model, prompts[0], middle, prompts[1], 3.0, cfg2, style).args[0]
        return sample_guider(guider, sigmas(model))

    base, expert = models
    everywhere, alone = dual(blended(models, **EVERYWHERE)[0], PROMPTS), dual(expert, EXPERT_PROMPTS)
    if style == "regular" and cfg2 == 1.0:
        # here only the blend evaluates the expert's negative prompt; the larger batch changes the rounding
        torch.testing.assert_close(everywhere, alone, rtol=1e-4, atol=1e-3)
    else:
        assert torch.equal(everywhere, alone)
    assert torch.equal(dual(blended(models, **NOWHERE)[0], PROMPTS), dual(base, PROMPTS))
    model, trace = blended(models)
    assert not torch.equal(dual(model, PROMPTS), dual(base, PROMPTS))
    assert 0.02 < trace.record.mean_shares()[1].mean() < 0.98


def test_guider_without_negative_rejected_with_hint(models):
    model, _ = blended(models)
    guider = custom.BasicGuider.execute(model, PROMPTS[0]).args[0]
    with pytest.raises(ValueError, match=r"no negative.*CFGGuider"):
        sample_guider(guider, sigmas(model))


@pytest.mark.parametrize("same_checkpoint", [False, True])
def test_cfg_1_blends_cond_and_leaves_uncond_unchanged(models, same_checkpoint):
    base, expert = models[0], models[0 if same_checkpoint else 1]
    model, trace = blend(base, expert, *EXPERT_PROMPTS)
    model, calls = recording(model)
    sample(model, cfg=1.0)
    plain, plain_calls = recording(base)
    sample(plain, cfg=1.0)
    alone = [predictions(base, *PROMPTS, calls), predictions(expert, *EXPERT_PROMPTS, calls)]
    for i, call in enumerate(calls):
        assert torch.equal(call.uncond, plain_calls[i].uncond)
        pairs = [(a[i].cond, a[i].uncond) for a in alone]
        expected = definition(call, pairs, strengths=[1, 1], guidance=[1.0, 1.0])
        assert expected.certain.mean() > 0.99
        owner = trace.record.shares(i).argmax(0)
        assert (owner.numpy() == expected.weights.argmax(0))[expected.certain].all()
        # ComfyUI evaluates only the positive prompt; ``predictions`` evaluates both prompts in one batch, which changes
        # the rounding
        expected_cond = torch.where(owner.unsqueeze(1) == 1, pairs[1][0], pairs[0][0])
        torch.testing.assert_close(call.cond, expected_cond, rtol=1e-4, atol=1e-3)
