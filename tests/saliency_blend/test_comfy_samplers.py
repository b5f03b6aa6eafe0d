"""The blend through the host's sampler nodes, guiders, previews, and guidance methods that predict again."""

import math

import comfy.model_management
import comfy.samplers
import comfy.utils
import comfy_extras.nodes_custom_sampler as custom
import nodes
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance

from chorus.tests.support.blend_definition import definition
from chorus.tests.support.host_definition import check_step, run
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
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
NOWHERE = dict(bias=-100.0)
CFG, STEPS = 5.0, 3


@pytest.fixture(scope="module")
def models():
    return unet(0), unet(1)


def sample(model, words=WORDS, **sampling):
    return ksample(model, *words, latent(2, 12, 10), **{"steps": STEPS, "cfg": CFG, **sampling})


def blended(models, **inputs):
    return blend(*models, *EXPERT_WORDS, **inputs)


def sigmas(model, steps=STEPS):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)


@in_inference_mode
def sample_custom(model):
    euler = comfy.samplers.sampler_object("euler")
    out = custom.SamplerCustom.execute(model, True, 1, CFG, *WORDS, euler, sigmas(model), latent(2, 12, 10))
    return out.args[0]["samples"]


@in_inference_mode
def sample_guider(guider, levels):
    noise, euler = custom.Noise_RandomNoise(1), comfy.samplers.sampler_object("euler")
    return custom.SamplerCustomAdvanced.execute(noise, guider, euler, levels, latent(2, 12, 10)).args[0]["samples"]


def sample_advanced_guider(model):
    return sample_guider(custom.CFGGuider.execute(model, *WORDS, CFG).args[0], sigmas(model))


@in_inference_mode
def sample_advanced(model, start=0, end=10000, leftover="disable", noise="enable", samples=None):
    node = nodes.KSamplerAdvanced()
    samples = {"samples": samples} if samples is not None else latent(2, 12, 10)
    return node.sample(model, noise, 1, STEPS, CFG, "euler", "normal", *WORDS, samples, start, end, leftover)[0][
        "samples"
    ]


@pytest.mark.parametrize("through", [sample_custom, sample_advanced_guider, sample_advanced])
def test_every_sampler_node_gives_the_same(models, through):
    model, trace = blended(models)
    expected = sample(model)
    assert torch.equal(through(model), expected)
    assert len(trace.record.steps) == STEPS
    assert trace.record.belongs_to(expected)
    assert 0.02 < trace.record.mean_shares()[1].mean() < 0.98


def test_a_run_in_two_halves_is_one_run(models):
    """KSampler (Advanced) hands the noisy latent on; windows are in sampling percent, so each half keeps its place."""
    model, trace = blended(models, end_percent=0.5)
    whole, steps = sample(model), trace.record.steps
    half = sample_advanced(model, end=2, leftover="enable")
    assert [s.sigma for s in trace.record.steps] == [s.sigma for s in steps[:2]]
    rest = sample_advanced(model, start=2, noise="disable", samples=half)
    assert [(s.sigma, s.models) for s in trace.record.steps] == [(s.sigma, s.models) for s in steps[2:]]
    # the latent leaves and re-enters the model's scale between the halves
    torch.testing.assert_close(rest, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "sampler",
    ["euler", "heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "lcm", "uni_pc_bh2", "res_multistep", "ddim"],
)
def test_each_side_alone_through_other_samplers(models, sampler):
    base, expert = models
    assert torch.equal(
        sample(blended(models, **EVERYWHERE)[0], sampler=sampler), sample(expert, EXPERT_WORDS, sampler=sampler)
    )
    assert torch.equal(sample(blended(models, **NOWHERE)[0], sampler=sampler), sample(base, sampler=sampler))


def ahead(known, sigma):
    """What stands in for an evaluation at ``sigma``: the last offset, or half a first-order step in ln sigma beyond it.

    ``known``: (sigma, offset) of the evaluations so far. The step never goes farther than the last two are apart.
    """
    if len(known) == 1:
        return known[0][1]
    (s0, o0), (s1, o1) = known[-2:]
    t = min(max(math.log(sigma / s1) / math.log(s1 / s0), 0.0), 1.0)
    return [b + 0.5 * t * (b - a) for a, b in zip(o0, o1, strict=True)]


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2"])
@pytest.mark.parametrize("refresh", [2, 3])
def test_refresh_runs_the_expert_once_per_interval(models, sampler, refresh):
    """And follows its offsets from the base, for cond and uncond, in the other calls."""
    steps = 5  # so that two evaluations are known before the end
    record, calls, pairs = run(
        models, [WORDS, EXPERT_WORDS], latent(2, 17, 23), [dict(refresh=refresh)], steps=steps, sampler=sampler
    )
    levels = comfy.samplers.KSampler(models[0], steps, models[0].load_device, sampler, "normal").sigmas
    group_of_last, known, followed = None, [], 0
    for i, call in enumerate(calls):
        # sigmas fall; the first interval starts at the first of them
        interval = int((levels >= call.sigma[0]).sum()) - 1
        base, now = pairs[i]
        sigma = float(call.sigma[0])
        if interval // refresh != group_of_last:
            group_of_last = interval // refresh
            known.append((sigma, [e - b for e, b in zip(now, base, strict=True)]))
        else:
            followed += len(known) > 1 and sigma < known[-1][0]
            now = [b + o for b, o in zip(base, ahead(known, sigma), strict=True)]
        check_step(record, i, call, definition(call, [base, now], strengths=[1, 1], guidance=[CFG] * 2))
    assert followed  # in at least one call by an offset that has moved on
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
    # the host shows the first sample of x0, here with the latent format's own factors
    latent_format = models[0].get_model_object("latent_format")
    factors, bias = torch.tensor(latent_format.latent_rgb_factors), latent_format.latent_rgb_factors_bias
    for (_, picture, _), call in zip(shown, calls, strict=True):
        rgb = torch.einsum("chw,cr->hwr", call.denoised[0], factors) + (0.0 if bias is None else torch.tensor(bias))
        expected = ((rgb + 1) / 2).clamp(0, 1).mul(255).byte()
        got = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(expected.shape)
        assert (got.int() - expected.int()).abs().max() <= 1


@in_inference_mode
def perturbed(model):
    return PerturbedAttentionGuidance.execute(model, 3.0).args[0]


@in_inference_mode
def self_attention(model):
    return SelfAttentionGuidance.execute(model, 0.5, 2.0).args[0]


@pytest.mark.parametrize("guide", [perturbed, self_attention])
@pytest.mark.parametrize("refresh", [1, 2])
def test_predicting_again_advances_neither_refresh_nor_trace(models, guide, refresh):
    """PAG and SAG ask once more at the same sigma."""
    model, trace = blended(models, refresh=refresh)
    guided = guide(model)
    sample(guided, steps=4)
    assert len(trace.record.steps) == 4
    assert trace.record.spent == [4, 4 // refresh]


def test_perturbed_attention_costs_the_expert_nothing(models):
    guided = perturbed(blended(models)[0])
    with forwards(models[0]) as base_rows, forwards(models[1]) as expert_rows:
        sample(guided)
    assert len(base_rows) == 2 * STEPS
    assert len(expert_rows) == STEPS


@pytest.mark.parametrize("guide", [perturbed, self_attention])
def test_guidance_of_the_base_stays_with_the_base(models, guide):
    plain = sample(models[0]), sample(guide(models[0]))
    assert not torch.equal(*plain)
    assert torch.equal(sample(guide(blended(models, **NOWHERE)[0])), plain[1])


def test_perturbed_attention_of_the_base_does_not_touch_the_expert(models):
    assert torch.equal(sample(perturbed(blended(models, **EVERYWHERE)[0])), sample(models[1], EXPERT_WORDS))


@pytest.mark.parametrize("style", ["regular", "nested"])
@pytest.mark.parametrize("cfg2", [2.0, 1.0])
def test_dual_cfg_blends_all_three_predictions(models, style, cfg2):
    middle = conditioning(50)

    def dual(model, words):
        with torch.inference_mode():
            guider = custom.DualCFGGuider.execute(model, words[0], middle, words[1], 3.0, cfg2, style).args[0]
        return sample_guider(guider, sigmas(model))

    base, expert = models
    everywhere, alone = dual(blended(models, **EVERYWHERE)[0], WORDS), dual(expert, EXPERT_WORDS)
    if style == "regular" and cfg2 == 1.0:
        # the expert's negative, which the host leaves out here, rides in one batch and moves the rounding
        torch.testing.assert_close(everywhere, alone, rtol=1e-4, atol=1e-3)
    else:
        assert torch.equal(everywhere, alone)
    assert torch.equal(dual(blended(models, **NOWHERE)[0], WORDS), dual(base, WORDS))
    model, trace = blended(models)
    assert not torch.equal(dual(model, WORDS), dual(base, WORDS))
    assert 0.02 < trace.record.mean_shares()[1].mean() < 0.98


def test_a_guider_without_negative_is_refused_with_the_one_to_use(models):
    model, _ = blended(models)
    guider = custom.BasicGuider.execute(model, WORDS[0]).args[0]
    with pytest.raises(ValueError, match=r"no negative.*CFGGuider"):
        sample_guider(guider, sigmas(model))


@pytest.mark.parametrize("same_checkpoint", [False, True])
def test_cfg_1_has_a_saliency_and_leaves_the_empty_slot_empty(models, same_checkpoint):
    base, expert = models[0], models[0 if same_checkpoint else 1]
    model, trace = blend(base, expert, *EXPERT_WORDS)
    model, calls = recording(model)
    sample(model, cfg=1.0)
    plain, plain_calls = recording(base)
    sample(plain, cfg=1.0)
    asked = [predictions(base, *WORDS, calls), predictions(expert, *EXPERT_WORDS, calls)]
    for i, call in enumerate(calls):
        assert torch.equal(call.uncond, plain_calls[i].uncond)
        pairs = [(a[i].cond, a[i].uncond) for a in asked]
        expected = definition(call, pairs, strengths=[1, 1], guidance=[1.0, 1.0])
        assert expected.certain.mean() > 0.99
        owner = trace.record.shares(i).argmax(0)
        assert (owner.numpy() == expected.weights.argmax(0))[expected.certain].all()
        # the host asks for the prompt alone, `predictions` for both in one batch, which rounds differently
        painted = torch.where(owner.unsqueeze(1) == 1, pairs[1][0], pairs[0][0])
        torch.testing.assert_close(call.cond, painted, rtol=1e-4, atol=1e-3)
