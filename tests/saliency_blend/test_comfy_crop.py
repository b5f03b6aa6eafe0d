"""Experts that are evaluated only on a box: input sizes of the network, the result outside the box, and the cost."""

import math

import comfy.latent_formats
import comfy.model_base
import comfy.supported_models
import nodes
import pytest
import torch

from chorus.nodes.saliency_noise_blend import SaliencyNoiseBlend
from chorus.tests.support import tiny_models
from chorus.tests.support.crops import mask, recorded_sizes, with_area
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
    controlnet,
    in_inference_mode,
    ksample,
    latent,
    predictions,
    recording,
    unet,
)

PROMPTS, EXPERT_PROMPTS, OTHER_PROMPTS = [(conditioning(i), conditioning(i + 1)) for i in (10, 30, 50)]


@pytest.fixture(scope="module")
def models():
    return unet(0), unet(1)


FORCED = {
    # latent size, rows and columns of the region, margin, and the expected box (top, left, height, width). The box is
    # rounded out to multiples of 4, except at the border of the latent
    "odd border": ((17, 23), (10, 15), (0, 6), 2, (8, 0, 9, 8)),
    "rounded out": ((32, 40), (9, 15), (18, 30), 2, (4, 16, 16, 16)),
    "aligned": ((24, 32), (9, 15), (17, 23), 1, (8, 16, 8, 8)),
}


def forced(case):
    size, rows, columns, margin, box = FORCED[case]
    region = mask(size, rows, columns)
    return size, dict(region=region, region_mode="force", crop_margin=margin), region[0].bool(), box


@pytest.mark.parametrize(("case", "sampler"), [*((c, "euler") for c in FORCED), ("odd border", "heun")])
def test_expert_is_evaluated_only_on_the_box_of_its_forced_region(models, case, sampler):
    size, inputs, region, box = forced(case)
    base, expert = models
    blended, trace = blend(base, expert, *EXPERT_PROMPTS, **inputs)
    blended, calls = recording(blended)
    with recorded_sizes(base) as base_sizes, recorded_sizes(expert) as expert_sizes:
        ksample(blended, *PROMPTS, latent(2, *size), sampler=sampler)
    assert base_sizes == [size] * len(calls)
    assert expert_sizes == [box[2:]] * len(calls)  # from the first step on
    alone, inside = predictions(base, *PROMPTS, calls), predictions(expert, *with_area(box, EXPERT_PROMPTS), calls)
    for i, call in enumerate(calls):
        for side in ("cond", "uncond"):
            got, outer, inner = (getattr(c, side) for c in (call, alone[i], inside[i]))
            assert torch.equal(got[..., ~region], outer[..., ~region])
            # ComfyUI multiplies the prediction on an area by a weight and then divides by this weight, which rounds
            torch.testing.assert_close(got[..., region], inner[..., region], rtol=1e-5, atol=1e-5)
        assert torch.equal(trace.record.shares(i)[1].bool(), region.expand(2, -1, -1))
    assert trace.record.spent[1] == len(calls)
    assert trace.record.cost[1] == pytest.approx(len(calls) * math.prod(box[2:]) / math.prod(size))


def test_cfg_1_keeps_the_bits_of_the_base_outside_the_box(models):
    size, inputs, region, box = forced("odd border")
    base, expert = models
    one_step = dict(samples=latent(2, *size), steps=1, cfg=1.0)
    with recorded_sizes(expert) as seen:
        got = ksample(blend(base, expert, *EXPERT_PROMPTS, **inputs)[0], *PROMPTS, **one_step)
    assert seen == [box[2:]]
    assert torch.equal(got[..., ~region], ksample(base, *PROMPTS, **one_step)[..., ~region])
    # at cfg 1 only the blend evaluates the expert's negative prompt; the larger batch changes the rounding
    alone = ksample(expert, *with_area(box, EXPERT_PROMPTS), **one_step)
    torch.testing.assert_close(got[..., region], alone[..., region], rtol=1e-4, atol=1e-3)


@in_inference_mode
def wan(seed):
    """A MODEL with a small video network."""
    config = comfy.supported_models.WAN21_T2V(
        dict(
            image_model="wan2.1",
            model_type="t2v",
            dim=48,
            ffn_dim=48,
            freq_dim=16,
            text_dim=tiny_models.CONTEXT,
            num_heads=2,
            num_layers=1,
            dtype=torch.float32,
        )
    )
    model = comfy.model_base.WAN21(config, device=torch.device("cpu"))
    tiny_models._fill(model.diffusion_model, torch.Generator().manual_seed(seed))
    return tiny_models._patcher(model)


def test_box_of_a_video_spans_all_frames():
    base, expert = wan(0), wan(1)
    region = mask((16, 24), (2, 7), (17, 21))
    blended, _ = blend(base, expert, *EXPERT_PROMPTS, region=region, region_mode="force", crop_margin=1)
    blended, calls = recording(blended)
    with recorded_sizes(expert) as seen:
        ksample(blended, *PROMPTS, {"samples": torch.zeros(2, 16, 3, 16, 24)}, steps=2)
    assert seen == [(3, 8, 8)] * 2
    alone, inside = (
        predictions(base, *PROMPTS, calls),
        predictions(expert, *with_area((0, 16, 8, 8), EXPERT_PROMPTS), calls),
    )
    region = region[0].bool()
    for call, outer, inner in zip(calls, alone, inside, strict=True):
        assert torch.equal(call.cond[..., ~region], outer.cond[..., ~region])
        assert torch.equal(call.uncond[..., ~region], outer.uncond[..., ~region])
        torch.testing.assert_close(call.cond[..., region], inner.cond[..., region], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(call.uncond[..., region], inner.uncond[..., region], rtol=1e-5, atol=1e-5)


def test_cropped_experts_with_the_same_checkpoint_as_the_base_are_evaluated_separately(models):
    """Without cropping, these experts are evaluated in one batch with the base."""
    base, size = models[0], (24, 24)
    regions = [mask(size, (2, 6), (1, 7)), mask(size, (10, 22), (17, 23))]
    boxes = [(0, 0, 8, 8), (8, 16, 16, 8)]
    first, _ = blend(base, base, *EXPERT_PROMPTS, region=regions[0], region_mode="force", crop_margin=1)
    second, trace = blend(first, base, *OTHER_PROMPTS, region=regions[1], region_mode="force", crop_margin=1)
    blended, calls = recording(second)
    with recorded_sizes(base) as seen:
        ksample(blended, *PROMPTS, latent(2, *size), steps=2)
    assert sorted(seen) == sorted([size, (8, 8), (16, 8)] * 2)
    alone = predictions(base, *PROMPTS, calls)
    inside = [
        predictions(base, *with_area(b, w), calls) for b, w in zip(boxes, (EXPERT_PROMPTS, OTHER_PROMPTS), strict=True)
    ]
    owned = [r[0].bool() for r in regions]
    for i, call in enumerate(calls):
        base_only = ~(owned[0] | owned[1])
        assert torch.equal(call.cond[..., base_only], alone[i].cond[..., base_only])
        for region, cropped in zip(owned, inside, strict=True):
            torch.testing.assert_close(call.cond[..., region], cropped[i].cond[..., region], rtol=1e-5, atol=1e-5)
    assert trace.record.cost == pytest.approx([2.0, 2 * 64 / 576, 2 * 128 / 576])


@in_inference_mode
def controlled(prompts):
    hint = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(4))
    return nodes.ControlNetApplyAdvanced().apply_controlnet(*prompts, controlnet(9), hint, 1.0, 0.0, 1.0)


def with_an_area(prompts):
    return [*prompts[0], *conditioning(33, area=(9, 5, 2, 1), strength=1.0)], prompts[1]


def with_a_default(prompts):
    """Prompts with a default conditioning for positions that no other conditioning covers (see ComfyUI's hook nodes)."""
    left = dict(mask=mask((16, 16), (0, 16), (0, 6)), mask_strength=1.0, set_area_to_bounds=False)
    return [*conditioning(30, **left), *conditioning(33, default=True)], prompts[1]


@pytest.mark.parametrize("extend", [controlled, with_an_area, with_a_default])
def test_expert_whose_conditioning_needs_the_whole_image_is_not_cropped_and_the_report_says_so(models, extend):
    prompts = extend(EXPERT_PROMPTS)
    forced = dict(region=mask((16, 16), (2, 6), (1, 7)), region_mode="force", label="guided")
    cropped, trace = blend(*models, *prompts, crop_margin=1, **forced)
    with recorded_sizes(models[1]) as seen:
        got = ksample(cropped, *PROMPTS, steps=2)
    with recorded_sizes(models[1]) as seen_whole:
        whole = ksample(blend(*models, *prompts, **forced)[0], *PROMPTS, steps=2)
    assert seen == seen_whole
    assert torch.equal(got, whole)
    assert trace.record.cost == [2.0, 2.0]
    assert "'guided' was not cropped" in trace.record.report()


def test_workflow_saved_before_crop_margin_existed_samples_the_same_bits(models):
    old = tiny_models.defaults(SaliencyNoiseBlend)
    del old["crop_margin"], old["skip_below"]
    before = in_inference_mode(SaliencyNoiseBlend.execute)(*models, **old).args[0]
    now, trace = blend(*models, crop_margin=0, skip_below=0.0)
    assert torch.equal(ksample(now, *PROMPTS), ksample(before, *PROMPTS))
    assert trace.record.cost == trace.record.spent
    assert "cropped" not in trace.record.report()


@pytest.mark.parametrize("rows", [16, 14])
def test_expert_with_a_region_of_nearly_the_whole_latent_is_not_cropped(models, rows):
    region = dict(region=mask((16, 16), (0, rows), (0, 16)), region_mode="force")
    cropped, trace = blend(*models, *EXPERT_PROMPTS, crop_margin=4, **region)
    assert torch.equal(ksample(cropped, *PROMPTS), ksample(blend(*models, *EXPERT_PROMPTS, **region)[0], *PROMPTS))
    assert trace.record.cost == [3.0, 3.0]
    assert "cropped" not in trace.record.report()


def test_report_shows_the_cost_of_cropped_evaluations(models):
    blended, trace = blend(
        *models, *EXPERT_PROMPTS, region=mask((16, 16), (1, 7), (1, 7)), region_mode="force", crop_margin=1
    )
    ksample(blended, *PROMPTS, steps=2)
    line = next(n for n in trace.record.report().splitlines() if n.startswith("expert 1"))
    assert "2 evaluations (as expensive as 0.5 full ones), 0 saved" in line


def test_box_around_the_regions_of_several_samples_is_reported():
    regions = torch.cat([mask((16, 16), (2, 6), (1, 7)), mask((16, 16), (8, 12), (2, 6))])
    for region, reported in ((regions, True), (regions[:1], False)):
        inputs = dict(region=region, region_mode="force", crop_margin=1)
        blended, trace = blend(unet(0), unet(1), *EXPERT_PROMPTS, **inputs)
        ksample(blended, *PROMPTS, latent(2, 16, 16), steps=2)
        assert ("was cropped to one box around its masks of all 2 samples" in trace.record.report()) == reported
