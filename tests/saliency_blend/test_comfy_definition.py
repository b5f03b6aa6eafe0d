"""The mask and the prediction of every step in ComfyUI's KSampler, compared with the definition at the same x.

The definition is the float64 computation in tests/support/blend_definition.py.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from chorus.tests.support.blend_definition import CFG, definition
from chorus.tests.support.host_definition import check_step, run
from chorus.tests.support.tiers import covering
from chorus.tests.support.tiny_models import conditioning, latent, unet


def prompts(count):
    """(positive, negative) for the base and each expert."""
    return [(conditioning(10 + i), conditioning(20 + i)) for i in range(count)]


@pytest.fixture(scope="module")
def models():
    return [unet(seed) for seed in range(3)]


SIZES = {"64x64": (64, 64), "17x23": (17, 23)}
STEPS = {"64x64": 1, "17x23": 3}  # a step at 64x64 takes as long as ten steps at 17x23


@covering(saliency=["own", "shared"], count=[2, 3], size=[*SIZES])
def test_mask_and_prediction_match_the_definition(models, saliency, count, size):
    strengths = [1.3, 0.8, 1.7][:count]
    inputs = dict(general_strength=strengths[0], saliency=saliency)
    record, calls, pairs = run(
        models[:count],
        prompts(count),
        latent(2, *SIZES[size]),
        [dict(expert_strength=k, **inputs) for k in strengths[1:]],
        steps=STEPS[size],
    )
    for i, call in enumerate(calls):
        expected = definition(call, pairs[i], strengths=strengths, guidance=[CFG] * count, saliency=saliency)
        check_step(record, i, call, expected)
        assert all(0.02 < share < 0.98 for share in expected.weights.mean((1, 2, 3))), "one model owns everything"


@pytest.mark.parametrize("saliency", ["own", "shared"])
@pytest.mark.parametrize("softness", [1.0, 0.1])
def test_soft_mask_matches_the_definition_at_every_position(models, softness, saliency):
    nodes = [
        dict(expert_strength=40.0, general_strength=30.0, mask_mode="soft", softness=softness, saliency=saliency)
    ] * 2
    record, calls, pairs = run(models, prompts(3), latent(2, 17, 23), nodes)
    for i, call in enumerate(calls):
        expected = definition(
            call, pairs[i], strengths=[30.0, 40.0, 40.0], guidance=[CFG] * 3, saliency=saliency, softness=softness
        )
        assert expected.weights.std() > 0.01, "a flat mask would test nothing"
        check_step(record, i, call, expected)


@pytest.mark.parametrize("blur", [1, 2, 3, 8])
def test_blur_matches_the_definition(models, blur):
    record, calls, pairs = run(models[:2], prompts(2), latent(1, 12, 10), [dict(blur=blur)])
    for i, call in enumerate(calls):
        check_step(record, i, call, definition(call, pairs[i], strengths=[1, 1], guidance=[CFG] * 2, blur=blur))


def test_last_node_of_the_chain_sets_the_joint_settings(models):
    first = dict(general_strength=9.0, saliency="shared", blur=9, mask_mode="soft", softness=3.0)
    last = dict(general_strength=1.5, saliency="own", blur=3, mask_mode="hard")
    record, calls, pairs = run(models, prompts(3), latent(1, 12, 10), [first, last])
    for i, call in enumerate(calls):
        check_step(record, i, call, definition(call, pairs[i], strengths=[1.5, 1, 1], guidance=[CFG] * 3, blur=3))


def test_expert_cfg_guides_only_its_expert(models):
    record, calls, pairs = run(models, prompts(3), latent(2, 17, 23), [dict(expert_cfg=2.0), dict(expert_cfg=9.0)])
    for i, call in enumerate(calls):
        check_step(record, i, call, definition(call, pairs[i], strengths=[1, 1, 1], guidance=[CFG, 2.0, 9.0]))


def test_expert_cfg_does_not_scale_the_shared_saliency(models):
    record, calls, pairs = run(models[:2], prompts(2), latent(1, 12, 10), [dict(expert_cfg=2.0, saliency="shared")])
    for i, call in enumerate(calls):
        expected = definition(call, pairs[i], strengths=[1, 1], guidance=[CFG, 2.0], saliency="shared")
        check_step(record, i, call, expected)


def percent(model, sigma):
    """Sampling percent of ``sigma`` by ComfyUI's table of sigmas. Percent 0 is pure noise."""
    table = model.get_model_object("model_sampling").sigmas.double().numpy()
    return 1 - np.interp(np.log(sigma), np.log(table), np.arange(len(table))) / (len(table) - 1)


@pytest.mark.parametrize("ramp", ["constant", "rising", "falling"])
def test_bias_is_added_to_the_log_score(models, ramp):
    start, end, bias = 0.1, 0.9, 0.2
    node = dict(bias=bias, ramp=ramp, start_percent=start, end_percent=end)
    record, calls, pairs = run(models[:2], prompts(2), latent(1, 12, 10), [node], steps=5)
    inside = []
    for i, call in enumerate(calls):
        done = (percent(models[0], call.sigma[0].double().numpy()) - start) / (end - start)
        if not 0 <= done < 1:
            continue
        inside.append(done)
        ramped = bias * {"constant": 1, "rising": done, "falling": 1 - done}[ramp]
        extra = np.array([0, ramped]).reshape(2, 1, 1, 1)
        expected = definition(call, pairs[i], strengths=[1, 1], guidance=[CFG] * 2, extra=extra)
        check_step(record, i, call, expected)
    assert len(inside) >= 3


def test_expert_takes_part_only_inside_its_window(models):
    node = dict(start_percent=0.3, end_percent=0.7)
    sides = prompts(3)
    record, calls, pairs = run(models, sides, latent(1, 12, 10), [node, dict(end_percent=0.5)], steps=8)
    taking_part = []
    for i, call in enumerate(calls):
        now = percent(models[0], call.sigma[0].double().numpy())
        active = [0, *[1] * bool(0.3 <= now < 0.7), *[2] * bool(now < 0.5)]
        taking_part.append(tuple(active))
        if active == [0]:
            assert torch.equal(call.cond, pairs[i][0][0])
            assert torch.equal(call.uncond, pairs[i][0][1])
            assert record.shares(i)[0].min() == 1.0
            continue
        expected = definition(
            call, [pairs[i][m] for m in active], strengths=[1] * len(active), guidance=[CFG] * len(active)
        )
        full = np.zeros((3, *expected.weights.shape[1:]))
        full[active] = expected.weights
        check_step(record, i, call, replace(expected, weights=full))
    assert set(taking_part) == {(0,), (0, 1), (0, 2), (0, 1, 2)}


def resize(mask, height, width):
    """Antialiased bilinear resize: a triangle filter whose width is the ratio of the sizes, and at least 1.

    Pixel centres are at 0.5, 1.5 and so on.
    """

    def weights(source, target):
        ratio = source / target
        centres = (np.arange(target) + 0.5) * ratio
        distance = np.abs(np.arange(source) + 0.5 - centres[:, None]) / max(ratio, 1)
        triangle = np.clip(1 - distance, 0, None)
        return triangle / triangle.sum(1, keepdims=True)

    return weights(mask.shape[-2], height) @ mask @ weights(mask.shape[-1], width).T


@covering(mask_size=[(2, 12, 10), (1, 96, 80), (1, 25, 33), (1, 6, 7)], mode=["compete", "force"])
def test_region_matches_the_definition(models, mode, mask_size):
    region = torch.rand(mask_size, generator=torch.Generator().manual_seed(0))
    region[:, : mask_size[1] // 3] = 0.0
    region[:, -mask_size[1] // 3 :] = 1.0
    record, calls, pairs = run(
        models[:2], prompts(2), latent(2, 12, 10), [dict(region=region, region_mode=mode)], steps=2
    )
    resized = np.broadcast_to(resize(region.double().numpy(), 12, 10), (2, 12, 10))
    # positions at the threshold 0.5 are not compared, because rounding decides them: the node resizes in float32
    off_threshold = np.abs(resized - 0.5) > 1e-6
    for i, call in enumerate(calls):
        if mode == "compete":
            with np.errstate(divide="ignore"):
                extra = np.stack([np.zeros_like(resized), np.log(resized)])
        else:
            extra = np.where(np.stack([resized < 0.5, resized >= 0.5]), 1e9, -1e9)
        expected = definition(call, pairs[i], strengths=[1, 1], guidance=[CFG] * 2, extra=extra)
        if mode == "force":
            expected.certain &= off_threshold
        check_step(record, i, call, expected)
        assert 0.02 < expected.weights[1].mean() < 0.98
        if mode == "compete":
            assert not expected.weights[1][resized == 0].any()


def test_noise_mask_and_denoise_match_the_definition(models):
    generator = torch.Generator().manual_seed(3)
    samples = {
        "samples": torch.randn(2, 4, 12, 10, generator=generator),
        "noise_mask": (torch.rand(1, 1, 96, 80, generator=generator) > 0.5).float(),
    }
    record, calls, pairs = run(models[:2], prompts(2), samples, [{}], denoise=0.6)
    for i, call in enumerate(calls):
        check_step(record, i, call, definition(call, pairs[i], strengths=[1, 1], guidance=[CFG] * 2))


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral", "uni_pc"])
def test_other_samplers_match_the_definition(models, sampler):
    record, calls, pairs = run(models[:2], prompts(2), latent(2, 17, 23), [{}], sampler=sampler, scheduler="karras")
    for i, call in enumerate(calls):
        check_step(record, i, call, definition(call, pairs[i], strengths=[1, 1], guidance=[CFG] * 2))
