"""mask_refresh: masks that are held over several steps, and the forward passes that they save."""

import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from comfy_extras.nodes_cfg import CFGNorm

from chorus.tests.support.blend_definition import definition
from chorus.tests.support.host_definition import check_mask, run
from chorus.tests.support.tiers import covering
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
    forwards,
    in_inference_mode,
    ksample,
    latent,
    perturbed,
    self_attention,
    unet,
)

PROMPTS, EXPERT_PROMPTS = [(conditioning(i), conditioning(i + 1)) for i in (10, 30)]
HALF = dict(region=(torch.arange(10) < 5).float().expand(1, 12, 10), region_mode="force")
STEPS = 6


@pytest.fixture(scope="module")
def models():
    return unet(0), unet(1)


def sample(model, prompts=PROMPTS, **sampling):
    return ksample(model, *prompts, latent(2, 12, 10), **{"steps": STEPS, "cfg": 1.0, **sampling})


def intervals(model, calls, sampler="euler"):
    """The interval between two sampling sigmas of each call."""
    levels = comfy.samplers.KSampler(model, STEPS, model.load_device, sampler, "normal").sigmas
    return [int((levels >= call.sigma[0]).sum()) - 1 for call in calls]


@covering(cfg=[1.0, 5.0], every=[2, 4], sampler=["euler", "heun"], mode=["hard", "soft"])
def test_mask_of_every_nth_interval_is_used_until_the_next_one(models, every, sampler, cfg, mode):
    settings = dict(mask_refresh=every, mask_mode=mode)
    record, calls, pairs = run(
        models, [PROMPTS, EXPERT_PROMPTS], latent(2, 12, 10), [settings], cfg=cfg, steps=STEPS, sampler=sampler
    )
    group, mask, held = None, None, 0
    for i, (call, interval) in enumerate(zip(calls, intervals(models[0], calls, sampler), strict=True)):
        assert record.steps[i].held == (interval // every == group)
        if not record.steps[i].held:
            group, mask = interval // every, record.shares(i)
            softness = 1.0 if mode == "soft" else None
            expected = definition(call, pairs[i], strengths=[1, 1], guidance=[cfg] * 2, softness=softness)
            check_mask(record, i, expected)
        else:
            held += 1
            assert torch.equal(record.shares(i), mask)
        cond, uncond = (
            sum(weights.unsqueeze(1) * pair[side] for weights, pair in zip(mask, pairs[i], strict=True))
            for side in (0, 1)
        )
        torch.testing.assert_close(call.denoised, uncond + cfg * (cond - uncond), rtol=1e-4, atol=1e-4)
    assert held >= STEPS // 2
    assert 0.05 < mask[1].mean() < 0.95


@pytest.mark.parametrize(
    ("inputs", "base_rows", "expert_rows"),
    [
        # cond and uncond of both models where the mask is computed (intervals 0 and 3), cond of both elsewhere
        (dict(), [2] * 8, [4, 2, 2, 4, 2, 2]),
        (dict(bias=-100.0), [2] * 8, [4, 4]),  # the base generates everywhere
        (dict(bias=100.0), [2] * 4, [4, 2, 2, 4, 2, 2]),  # the expert generates everywhere
        (dict(refresh=3), [2] * 8, [4, 4]),  # the expert is extrapolated in between
    ],
)
def test_held_mask_evaluates_only_what_it_needs_at_cfg_1(models, inputs, base_rows, expert_rows):
    """Rows of each forward pass, for two samples. At cfg 1 the base's negative is a separate forward pass."""
    model, trace = blend(*models, *EXPERT_PROMPTS, mask_refresh=3, **inputs)
    with forwards(models[0]) as base, forwards(models[1]) as expert:
        sample(model)
    assert (base, expert) == (base_rows, expert_rows)
    spent = [6 if inputs.get("bias") != 100.0 else 2, len(expert_rows)]
    assert trace.record.spent == spent
    assert trace.record.saved == [6 - n for n in spent]
    assert trace.record.cost == [sum(base_rows) / 4, sum(expert_rows) / 4]
    assert "4 of them with the mask of an earlier prediction (mask_refresh)" in trace.record.report()


def test_mask_is_computed_at_the_first_step_of_a_window(models):
    model, trace = blend(*models, *EXPERT_PROMPTS, mask_refresh=4, start_percent=0.3)
    sample(model)
    steps = trace.record.steps
    assert steps[0].models == (0,)
    first = next(i for i, step in enumerate(steps) if len(step.models) == 2)
    assert [i for i, step in enumerate(steps) if i >= first and not step.held] == [first, 4]


def plain(model):
    return model


@in_inference_mode
def with_norm(model):
    return CFGNorm.execute(model, 0.7).args[0]


KINDS = {
    "plain": (plain, plain, {}),
    "expert_cfg": (plain, plain, dict(expert_cfg=3.0)),
    "soft": (plain, plain, dict(mask_mode="soft", softness=0.5)),
    "refresh": (plain, plain, dict(refresh=2)),
    "refresh and expert_cfg": (plain, plain, dict(refresh=2, expert_cfg=3.0)),
    "crop": (plain, plain, dict(crop_margin=1)),
    "crop and expert_cfg": (plain, plain, dict(crop_margin=1, expert_cfg=3.0)),
    "guidance of the expert": (plain, with_norm, {}),
    "PAG of the expert": (plain, perturbed, dict(refresh=2)),
    "PAG of the base": (perturbed, plain, {}),
    "SAG of the base": (self_attention, plain, {}),
}


@covering(kind=KINDS, cfg=[1.0, 5.0], same=[False, True])
def test_held_mask_of_a_forced_region_changes_nothing(models, kind, cfg, same):
    """Its mask does not depend on the predictions, so that holding it gives the same images."""
    base, expert, inputs = kind
    other = models[0] if same else models[1]

    def samples(**more):
        model = blend(base(models[0]), expert(other), *EXPERT_PROMPTS, **HALF, **inputs, **more)[0]
        with forwards(models[0]) as rows, forwards(models[1]) as others:
            found = sample(model, cfg=cfg)
        return found, sum(rows) + sum(others)

    (expected, before), (found, after) = samples(), samples(mask_refresh=4)
    # rows of other batches differ in the last bits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert after <= before
    if cfg == 1.0 and base is plain and expert is plain and not inputs:
        assert after < 0.7 * before


@pytest.mark.parametrize("middle", [3.0, 1.0])
def test_middle_conditioning_of_a_guider_is_blended_with_the_held_mask(models, middle):
    """DualCFGGuider asks for three conditionings; the third is blended with the same mask."""
    between = conditioning(50)

    @in_inference_mode
    def samples(**more):
        model = blend(*models, *EXPERT_PROMPTS, **HALF, **more)[0]
        guider = custom.DualCFGGuider.execute(model, PROMPTS[0], between, PROMPTS[1], middle, 4.0, "regular").args[0]
        sigmas = comfy.samplers.calculate_sigmas(models[0].get_model_object("model_sampling"), "normal", STEPS)
        noise, euler = custom.Noise_RandomNoise(1), comfy.samplers.sampler_object("euler")
        return custom.SamplerCustomAdvanced.execute(noise, guider, euler, sigmas, latent(2, 12, 10)).args[0]["samples"]

    torch.testing.assert_close(samples(mask_refresh=4), samples(), rtol=1e-4, atol=1e-4)


def test_expert_that_generates_everywhere_equals_the_expert_alone(models):
    model = blend(*models, *EXPERT_PROMPTS, region=torch.ones(1, 8, 8), region_mode="force", mask_refresh=3)[0]
    # where the mask is computed, cond is in a batch with uncond, which changes the last bits
    torch.testing.assert_close(sample(model), sample(models[1], EXPERT_PROMPTS), rtol=1e-4, atol=1e-4)


def test_three_models_hold_one_mask(models):
    third = unet(2)
    record, _, _ = run(
        [*models, third],
        [PROMPTS, EXPERT_PROMPTS, (conditioning(60), conditioning(61))],
        latent(2, 12, 10),
        [dict(), dict(mask_refresh=2)],
        cfg=1.0,
        steps=STEPS,
    )
    assert [step.held for step in record.steps] == [False, True] * 3
    for i in range(0, STEPS, 2):
        assert torch.equal(record.shares(i), record.shares(i + 1))
    assert all(0.02 < share < 0.98 for share in record.mean_shares().flatten(1).mean(1).tolist())
    assert "mask_refresh 2" in "".join(record.notes)
